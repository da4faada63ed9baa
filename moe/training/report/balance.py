"""The part of the page about how evenly the experts of each layer are loaded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import PercentFormatter

from moe.monitor import max_violation_floor
from moe.training.metrics import MAX_VIO
from moe.training.report.figures import Chart, Drawing, Line, draw
from moe.training.report.heatmap import color_half_range, draw_load
from moe.training.report.history import Curve, History
from moe.training.report.numbers import MISSING, decimal, percent
from moe.training.report.summary import RunSummary
from moe.training.report.theme import series_dash, series_variable

VALIDATION_MAX_VIO = "val/max_vio/"

_CHARTS = {
    MAX_VIO: Chart(
        "max-vio", "MaxVio", "Load of the busiest expert over the mean, minus 1. Circles: validation.", "MaxVio",
        bottom=0, span=0.05, logarithmic=True,
    ),
    "balance/cv/": Chart(
        "cv", "Coefficient of variation", "Standard deviation of the loads over their mean.", "deviation / mean",
        bottom=0, span=0.05,
    ),
    "balance/entropy/": Chart(
        "entropy", "Entropy of the load", "Over log E: 1 is even, log K / log E the least.", "entropy / log E",
        top=1, span=0.02,
    ),
    "balance/dead_experts/": Chart(
        "dead-experts", "Dead experts", "Experts that got no token at all.", "experts",
        bottom=0, span=1, whole=True,
    ),
    "balance/drop_rate/": Chart(
        "drop-rate", "Drop rate", "Assignments beyond the experts' capacity.", "dropped",
        bottom=0, span=0.01, ticks=PercentFormatter(1),
    ),
    "balance/confidence/": Chart(
        "confidence", "Router confidence", "Mean score of each token's first expert.", "mean top score", span=0.02,
    ),
}  # fmt: skip
"""What is drawn for each layer, by what its keys start with."""


@dataclass(frozen=True)
class Swatch:
    """A layer's name and how its curve is drawn."""

    name: str
    """As in the keys of the metrics."""

    variable: str
    """CSS variable of its colour."""

    dash: str
    """CSS border style."""


@dataclass(frozen=True)
class BalanceRow:
    """Where a layer's balance stands at the end, each number as a reader wants it."""

    layer: Swatch
    num_experts: int
    max_vio: str
    floor: str
    cv: str
    entropy: str
    dead_experts: str
    drop_rate: str
    confidence: str
    validation_max_vio: str
    validation_floor: str
    max_vio_value: float
    """``max_vio`` as a number, NaN if there is none."""


def swatches(history: History) -> list[Swatch]:
    """How each layer is drawn, in the order of the layers.

    Args:
        history: what was measured.
    """
    return [Swatch(layer, series_variable(index), series_dash(index)) for index, layer in enumerate(history.layers)]


def draw_balance(history: History, summary: RunSummary) -> list[Drawing]:
    """Draw each measure of balance, all layers in one figure.

    Args:
        history: what was measured.
        summary: for MaxVio's sampling floor.

    Returns:
        The figures; none for a dense model.
    """
    drawings = []
    for prefix, chart in _CHARTS.items():
        lines = [Line(history.curve(prefix + layer), index) for index, layer in enumerate(history.layers)]
        if prefix == MAX_VIO:
            lines += [
                Line(history.curve(VALIDATION_MAX_VIO + layer), index, dots=True)
                for index, layer in enumerate(history.layers)
            ]
            lines.append(Line(_floor_curve(history, summary), None, "sampling floor"))
        drawings.append(draw(chart, lines))
    return [drawing for drawing in drawings if drawing is not None]


def draw_loads(history: History) -> list[Drawing]:
    """Draw the load of each expert over time, one figure a layer, all in the same colours.

    Args:
        history: what was measured.

    Returns:
        The figures; none for a dense model.
    """
    loads = [history.loads(layer) for layer in history.layers]
    if not loads:
        return []
    half_range = color_half_range(loads)
    experts = sum(load.shares.shape[1] for load in loads)
    return [
        draw_load(f"load-{index}", layer, load, half_range, experts)
        for index, (layer, load) in enumerate(zip(history.layers, loads, strict=True))
    ]


def balance_rows(history: History, summary: RunSummary) -> list[BalanceRow]:
    """Each layer's last measures.

    Args:
        history: what was measured.
        summary: for the sampling floors.

    Returns:
        One row a layer, in their order.
    """
    pooled = _pooled_assignments(history, summary)
    checked = summary.top_k * summary.validation_tokens if summary.validation_tokens else None
    return [_row(history, swatch, pooled, checked) for swatch in swatches(history)]


def worst_row(rows: Sequence[BalanceRow]) -> BalanceRow | None:
    """The layer with the highest MaxVio in training, None if none has one.

    Args:
        rows: each layer's measures.
    """
    measured = [row for row in rows if not math.isnan(row.max_vio_value)]
    return max(measured, key=lambda row: row.max_vio_value, default=None)


def _row(history: History, swatch: Swatch, pooled: float | None, checked: float | None) -> BalanceRow:
    layer, experts = swatch.name, history.num_experts(swatch.name)
    last = history.last
    max_vio, dead = last(MAX_VIO + layer), last("balance/dead_experts/" + layer)
    return BalanceRow(
        layer=swatch,
        num_experts=experts,
        max_vio=decimal(max_vio),
        floor=_floor(experts, pooled),
        cv=decimal(last("balance/cv/" + layer)),
        entropy=decimal(last("balance/entropy/" + layer), 4),
        dead_experts=decimal(dead, 0),
        drop_rate=percent(last("balance/drop_rate/" + layer)),
        confidence=decimal(last("balance/confidence/" + layer)),
        validation_max_vio=decimal(last(VALIDATION_MAX_VIO + layer)),
        validation_floor=_floor(experts, checked),
        max_vio_value=math.nan if max_vio is None else max_vio,
    )


def _floor(experts: int, assignments: float | None) -> str:
    return decimal(max_violation_floor(experts, assignments / experts)) if assignments else MISSING


def _pooled_assignments(history: History, summary: RunSummary) -> float | None:
    """Assignments that the last MaxVio of training counts."""
    tokens = history.tokens_per_step()
    steps = min(summary.pooled_steps, history.last_step)
    return tokens * steps * summary.top_k if tokens else None


def _floor_curve(history: History, summary: RunSummary) -> Curve:
    """The sampling floor of MaxVio over time: it falls while the first steps are pooled.

    Layers of several sizes have several floors: the curve is then empty, and the table has them.
    """
    sizes = {history.num_experts(layer) for layer in history.layers}
    tokens = history.tokens_per_step()
    if len(sizes) != 1 or not tokens or not summary.top_k:
        return Curve(np.empty(0), np.empty(0))
    experts = sizes.pop()
    steps = history.loads(history.layers[0]).steps
    pooled = np.clip(steps, 1, summary.pooled_steps) * tokens * summary.top_k / experts
    return Curve(steps, np.array([max_violation_floor(experts, count) for count in pooled.tolist()]))
