"""The lines of one run, by key instead of by step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from moe.training.metrics import STATUS, Record, record_step

LOAD = "balance/load/"
"""What the key of a layer's load starts with; the layer's name follows."""


@dataclass(frozen=True)
class Curve:
    """One number over time."""

    steps: Float[np.ndarray, " N"]
    """Optimizer steps done."""

    values: Float[np.ndarray, " N"]
    """NaN where the value was not finite."""

    def __bool__(self) -> bool:
        """Whether there is anything to draw."""
        return bool(np.isfinite(self.values).any())

    def thinned(self, points: int) -> "Curve":
        """The same picture with fewer points.

        Of each group of neighbours only the lowest and the highest stay, so that no spike is lost or flattened.

        Args:
            points: how many points stay at most, an even number.
        """
        if len(self.steps) <= points:
            return self
        kept: list[int] = []
        for group in np.array_split(np.arange(len(self.steps)), points // 2):
            values = self.values[group]
            if np.isnan(values).all():
                kept.append(int(group[0]))
            else:
                kept.extend(sorted({int(group[np.nanargmin(values)]), int(group[np.nanargmax(values)])}))
        return Curve(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Loads:
    """The share of the assignments that each expert of a layer got, over time."""

    steps: Float[np.ndarray, " N"]
    """Optimizer steps done."""

    shares: Float[np.ndarray, "N E"]
    """Each row sums to 1."""


class History:
    """What was measured, by key."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Sort the lines.

        Args:
            records: as ``read_metrics`` returns them.
        """
        self._records = records
        keys = dict.fromkeys(key for record in records for key in record)  # in the order of first appearance
        self.layers: tuple[str, ...] = tuple(key.removeprefix(LOAD) for key in keys if key.startswith(LOAD))

    @property
    def last_step(self) -> int:
        """Optimizer steps done when the last line was written, 0 without lines."""
        return record_step(self._records[-1]) if self._records else 0

    @property
    def status(self) -> str | None:
        """How the run ended, None if it did not say so: it is still running, or was killed."""
        status = self._records[-1].get(STATUS) if self._records else None
        return str(status) if status is not None else None

    def curve(self, key: str) -> Curve:
        """A key's values over time.

        Args:
            key: as in the file.
        """
        pairs = [(float(record_step(line)), _number(line[key])) for line in self._records if key in line]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return Curve(table[:, 0], table[:, 1])

    def last(self, key: str) -> float | None:
        """A key's last value: NaN if it was not finite, None if there is none.

        Args:
            key: as in the file.
        """
        return next((_number(line[key]) for line in reversed(self._records) if key in line), None)

    def loads(self, layer: str) -> Loads:
        """A layer's loads over time.

        Args:
            layer: one of ``layers``.
        """
        lines = [
            (float(record_step(line)), load)
            for line in self._records
            if isinstance(load := line.get(LOAD + layer), list)
        ]
        shares = [[_number(share) for share in load] for _, load in lines]
        return Loads(np.array([step for step, _ in lines]), np.array(shares, dtype=np.float64))

    def num_experts(self, layer: str) -> int:
        """E of a layer.

        Args:
            layer: one of ``layers``.
        """
        return next(len(load) for line in reversed(self._records) if isinstance(load := line.get(LOAD + layer), list))

    def tokens_per_step(self) -> float | None:
        """Tokens that one optimizer step sees, None if no step was logged."""
        for line in reversed(self._records):
            step, tokens = record_step(line), line.get("tokens")
            if step > 0 and isinstance(tokens, int | float):
                return tokens / step
        return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
