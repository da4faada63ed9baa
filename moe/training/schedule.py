"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import final

from moe.config import option, require_positive
from moe.errors import ConfigError


class Decay(StrEnum):
    """How the learning rate falls after warm-up."""

    COSINE = "cosine"
    """Half a cosine from the peak to the floor (Loshchilov & Hutter 2016, arXiv 1608.03983, without restarts)."""
    WSD = "wsd"
    """Warm-up, stable, decay: the peak, then a straight line to the floor over the last ``decay_share`` of the run
    (MiniCPM, arXiv 2404.06395, section 4.2; linear decay as in arXiv 2405.18392)."""


@final
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate of each step.

    Args:
        peak: the highest rate.
        total_steps: steps of the run.
        warmup_steps: steps of linear rise; the first step already trains.
        decay: see ``Decay``.
        decay_share: share of the run that ``wsd`` decays over.
        floor: last rate over the peak.

    Raises:
        ConfigError: a value outside its range.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    decay: str = "cosine"
    decay_share: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        require_positive(peak=self.peak, total_steps=self.total_steps)
        option(Decay, "decay", self.decay)
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must be between 0 and total_steps={self.total_steps}")
        for name in ("decay_share", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == Decay.COSINE:
            start, shape = self.warmup_steps, _half_cosine
        else:
            start, shape = max(self.warmup_steps, round(self.total_steps * (1 - self.decay_share))), _line
        done = (step - start) / max(1, self.total_steps - start)
        return self.peak * (self.floor + (1 - self.floor) * shape(min(max(done, 0.0), 1.0)))


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def _line(done: float) -> float:
    return 1 - done
