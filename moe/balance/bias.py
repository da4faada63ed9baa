"""Balance without a loss: a bias for each expert, added to its score for selection only, moved by the load of a step.

Notation: ``c_e`` the assignments of expert e in the whole optimizer step, accumulation and all devices included, and
``f_e`` its share. All arithmetic is float32 or integer. Nothing moves where no token counts.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.balance.step_counts import StepCounts
from moe.config import require_positive
from moe.errors import ConfigError


@final
@dataclass(frozen=True)
class ScoreBias:
    """Raise the bias of experts that got less than the mean load, lower it for those that got more, by a fixed step.

    ``b_e += rate * sign(mean(c) - c_e)``. Not centred: the mean of the bias drifts where more experts are below the
    mean load than above it, which changes no selection.

    Args:
        rate: step; scores lie in 0..1. Published: 0.001 for runs of many thousand steps, which is too slow for some
            hundred.

    Raises:
        ConfigError: a rate that is not positive.

    Source: Wang et al. 2024 (arXiv 2408.15664, algorithm 1); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """

    rate: float = 1e-3

    state_rows: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_positive(rate=self.rate)

    def margins_at(self, step: int) -> None:
        """Counts are enough."""

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "0 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "0 E"]]:
        """The bias for the next step."""
        return bias - self.rate * excess(counts.tokens_per_expert).sign().float(), state


@final
@dataclass(frozen=True)
class RmsBias:
    """Move each bias in proportion to how far the load is off, all of them by ``rate`` in the root of the mean square.

    ``b_e += rate * (1/E - f_e) / RMS(f - 1/E)``, and no step where the load is exactly even. One expert that is far off
    moves much and the others little, where the sign moves all alike. A step keeps the mean of the bias.

    Args:
        rate: root mean square of a step; scores lie in 0..1.

    Raises:
        ConfigError: a rate that is not positive.

    Source: kexue.fm/archives/10757.
    """

    rate: float = 1e-3

    state_rows: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_positive(rate=self.rate)

    def margins_at(self, step: int) -> None:
        """Counts are enough."""

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "0 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "0 E"]]:
        """The bias for the next step."""
        off = excess(counts.tokens_per_expert).float()  # E * sum(c) times f - 1/E, above and below
        return bias - self.rate * off / root_mean_square(off), state


@final
@dataclass(frozen=True)
class MomentumBias:
    """Soft-clamped steps with momentum (SMEBU).

    ``d_e = rate * tanh(sharpness * (mean(c) - c_e) / mean(c))``, centred by ``d -= mean(d)``;
    ``m = momentum * m + (1 - momentum) * d``; ``b += m``. Far from balance an expert moves by the rate, as by the sign
    rule; near it the steps shrink with the deviation, so that the bias comes to rest. A step keeps the bias's mean.

    Args:
        rate: largest step; scores lie in 0..1.
        momentum: share of the last step that goes on, in [0, 1).
        sharpness: kappa; the relative deviation at which steps stop growing is about its inverse.

    Raises:
        ConfigError: a rate or sharpness that is not positive, a momentum outside [0, 1).

    Source: Soft-clamped Momentum Expert Bias Updates, Arcee Trinity Large Technical Report (Singh et al. 2026, arXiv
    2602.17004), with its values.
    """

    rate: float = 5e-4
    momentum: float = 0.5
    sharpness: float = 2.0

    state_rows: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(rate=self.rate, sharpness=self.sharpness)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum={self.momentum} must be in [0, 1)")

    def margins_at(self, step: int) -> None:
        """Counts are enough."""

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "1 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "1 E"]]:
        """The bias and the momentum for the next step."""
        c = counts.tokens_per_expert
        step = self.rate * (-self.sharpness * excess(c).float() / c.sum().clamp(min=1).float()).tanh()
        moved = self.momentum * state[0] + (1 - self.momentum) * (step - step.mean())
        some = counts.tokens > 0
        return torch.where(some, bias + moved, bias), torch.where(some, moved[None], state)


def root_mean_square(off: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Of an `excess`; 1 where the counts are exactly even, so that it may be divided by."""
    # Integers whose sum is 0 have a root mean square of at least 1 unless all are 0: they are multiples of E, or none
    # is 0.
    return off.square().mean().sqrt().clamp(min=1)


def excess(c: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    """``E * (c_e - mean(c))``, in integers: no rounding decides a sign."""
    return c * c.numel() - c.sum()
