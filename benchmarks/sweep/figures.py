"""From the counts of trainings to the figures of the report. All pure functions of results.

MaxVio is of each layer, and the mean over layers. *Early* are the first tenth of the steps, *late* the last quarter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import final

import numpy as np
import torch

from moe.monitor import LoadStats
from sweep.result import Load, Result

CPU = torch.device("cpu")
CAPACITIES = (1.0, 1.25)
"""Capacity factors whose drops are reported."""
TIME_BINS = 30
"""Of a heat map."""
_NOISE = 1e-6
"""As in the layer's own capacity: 0.1 * 3 / 3 * 10 is a little above 1 in binary."""


@final
@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half of its 95% interval: nan of a single one."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """By Student's distribution: seeds are few, and their spread is estimated too."""
        n = len(values)
        half = student(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(fmean(values), half, n)


def student(share: float, freedom: int) -> float:
    """The quantile of Student's t; the density of a in ``t = sqrt(freedom) * tan(a)`` is as ``cos(a)^(freedom-1)``."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angle).clip(min=0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(share * below[-1], below, angle))


def early(steps: Sequence[Mapping[str, Load]]) -> Sequence[Mapping[str, Load]]:
    """The first tenth, at least one step."""
    return steps[: max(1, len(steps) // 10)]


def late(steps: Sequence[Mapping[str, Load]]) -> Sequence[Mapping[str, Load]]:
    """The last quarter, at least one step."""
    return steps[len(steps) - max(1, len(steps) // 4) :]


def figures_of(result: Result) -> dict[str, float]:
    """Everything that the tables show of a training, by name."""
    last = late(result.steps)
    first, steps = (mean_figures(flat(part)) for part in (early(result.steps), last))
    pooled, validation = mean_figures(pool(last)), mean_figures(pool([result.evaluation]))
    total = [stats for stats in pool(last) if int(stats.tokens)]
    found = {
        "bits_per_byte": result.bits_per_byte,
        "loss": result.loss,
        "early": first["max_vio"],
        "late": steps["max_vio"],
        "step_floor": steps["max_vio_floor"],
        "pooled": pooled["max_vio"],
        "pooled_floor": pooled["max_vio_floor"],
        "evaluation": validation["max_vio"],
        "evaluation_floor": validation["max_vio_floor"],
        "cv": steps["cv"],
        "entropy": pooled["entropy"],
        "dead": pooled["dead_experts"],
        "null": pooled.get("null_rate", 0.0),
        "experts": fmean(float(stats.tokens_per_real_expert.sum() / stats.tokens) for stats in total),
        "seconds": median(result.step_seconds),
    }
    return found | {f"drop_{factor}": drop_rate(flat(last), result.top_k, factor) for factor in CAPACITIES}


def flat(steps: Iterable[Mapping[str, Load]]) -> list[LoadStats]:
    """Each step's load of each layer."""
    return [LoadStats.from_numbers(load, CPU) for step in steps for load in step.values()]


def pool(steps: Sequence[Mapping[str, Load]]) -> list[LoadStats]:
    """Each layer's load of all steps together."""
    return [sum_of(LoadStats.from_numbers(step[layer], CPU) for step in steps) for layer in steps[0]]


def sum_of(loads: Iterable[LoadStats]) -> LoadStats:
    """Of at least one."""
    first, *others = loads
    for stats in others:
        first = first + stats
    return first


def mean_figures(loads: Sequence[LoadStats]) -> dict[str, float]:
    """The mean of each figure that a load has."""
    found = [stats.floats() for stats in loads]
    return {name: fmean(each[name] for each in found) for name in found[0]}


def drop_rate(loads: Sequence[LoadStats], top_k: int, capacity_factor: float) -> float:
    """What a capacity would have dropped: assignments beyond ``ceil(factor * T * K / E)`` of an expert, over all."""
    dropped = total = 0
    for stats in loads:
        even = int(stats.tokens) * top_k / stats.tokens_per_expert.numel()
        capacity = math.ceil(capacity_factor * even - _NOISE)
        counts = stats.tokens_per_real_expert
        dropped += int((counts - capacity).clamp(min=0).sum())
        total += int(counts.sum())
    return dropped / max(total, 1)


def heat_map(result: Result) -> np.ndarray:
    """The last layer's load over time, 1 being an even share: ``(E, bins)``, a bin being consecutive steps."""
    layer = list(result.steps[0])[-1]
    counts = np.array([flat([{layer: step[layer]}])[0].tokens_per_real_expert.numpy() for step in result.steps])
    parts = np.array_split(counts, min(TIME_BINS, len(counts)))
    sums = np.stack([part.sum(0) for part in parts], axis=1)
    return sums * len(sums) / sums.sum(0).clip(min=1)


@final
@dataclass(frozen=True)
class Row:
    """A router with a balance, over its seeds."""

    name: str
    kind: str
    pair: str
    results: Sequence[Result]
    """By seed."""
    figures: Mapping[str, Estimate]


def rows_of(results: Iterable[Result]) -> list[Row]:
    """One a pair, the fewest bits first."""
    pairs: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        pairs.setdefault(result.pair, []).append(result)
    return sorted((_row(found) for found in pairs.values()), key=lambda row: row.figures["bits_per_byte"].mean)


def _row(results: Sequence[Result]) -> Row:
    first, found = results[0], [figures_of(result) for result in results]
    estimates = {name: Estimate.of([figures[name] for figures in found]) for name in found[0]}
    return Row(f"{first.router} / {first.balance}", first.kind, first.pair, results, estimates)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in both bits per byte and MaxVio in evaluation mode."""

    def place(row: Row) -> tuple[float, float]:
        return row.figures["bits_per_byte"].mean, row.figures["evaluation"].mean

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return [row for row in rows if not any(beats(place(other), place(row)) for other in rows)]
