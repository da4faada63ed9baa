"""Quantile balancing one step ahead, then small steps by counts.

A bias that is found from the scores of a step suits the router of that step, but the optimizer has moved the router
since, most of all at the beginning. So tokens of the step are scored again with the new weight, and the quantile is
taken of those margins. Nothing leaks: they were trained on already, with the old bias. Later the router is slower, and
the noise of each batch is what is left; a quantile takes all of it into the bias, a small step by the counts little.

Notation as in `moe.balance.quantile` and `moe.balance.bias`; t counts steps from 0.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, stack, where

from moe.balance.bias import rms_direction
from moe.balance.protocols import MarginRequest
from moe.balance.step_counts import StepCounts
from moe.config import require_positive, require_positive_integer
from moe.errors import ConfigError
from moe.kernels.margins import bin_edges, quantile

_LATE_SAMPLE = 512
"""Tokens of each call whose margins measure a late step: the same before and after, so that their chance cancels."""


@final
@dataclass(frozen=True)
class LookaheadBias:
    """First to the K/E quantile of each expert's margins under the router's new weight, then in steps by the counts.

    In the first ``early_steps`` the move is ``q_e = quantile_{K/E}(m_e)`` with margins under the new weight. After them
    it is ``rate * M * (1/E - f_e) / RMS(f - 1/E)``, with M the mean absolute margin, but not above ``limit * |q_e|``:
    what is nearly right moves little. To this is added ``q'_e - q_e``, the same quantile under the new weight less that
    of the decisions, which is what the weight has changed. Every move is centred. Steps are measured by margins, so the
    same numbers suit every score function.

    The layer scores tokens of each of its calls once more after the step: ``sample`` early, 512 later. That is a
    product of the router, and as many rows of its input are kept until then. With several devices each takes its own,
    and their histograms add up; the counts are of all tokens.

    Args:
        rate: root mean square of a late step, over the mean absolute margin.
        limit: the longest late step, over the one that the margins ask for.
        early_steps: how many there are; a little more than those in which the learning rate warms up.
        sample: tokens of each call, evenly spaced over it; all where it has fewer. Of n tokens an expert should get
            ``n K / E``, and chance adds or takes the root of that.

    Raises:
        ConfigError: an argument is not positive.

    Source: ours; the quantile is J. Su's (kexue.fm/archives/11619), the normalised step too (kexue.fm/archives/10757).
    """

    rate: float = 0.08
    limit: float = 0.5
    early_steps: int = 50
    sample: int = 2048

    state_rows: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require_positive(rate=self.rate, limit=self.limit)
        require_positive_integer(early_steps=self.early_steps, sample=self.sample)

    def margins_at(self, step: int) -> MarginRequest:
        """Early under the new weight, late also as decided."""
        is_early = step < self.early_steps
        return MarginRequest(self.sample if is_early else _LATE_SAMPLE, decided=not is_early, ahead=True)

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "0 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "0 E"]]:
        """The bias for the next step.

        Raises:
            ConfigError: the counts are without margins.
        """
        decided, ahead = counts.margins, counts.margins_ahead
        if ahead is None or (decided is None and counts.step >= self.early_steps):
            raise ConfigError("counts.margins=None must be a histogram: a LookaheadBias moves by the margins of a step")
        if decided is None:
            move = quantile(ahead, counts.share)
        else:
            move, own = quantile(stack([ahead, decided]), counts.share)
            longest = self.limit * own.abs()
            step = self.rate * _mean_margin(decided) * rms_direction(counts.tokens_per_expert)
            move = move - own + step.clamp(-longest, longest)
        moved = bias + move
        return where(counts.tokens > 0, moved - moved.mean(), bias), state


def _mean_margin(counts: Int[Tensor, "E bins"]) -> Float[Tensor, ""]:
    """The mean absolute margin of a histogram, each at the middle of its bin; 0 where nothing was counted."""
    edges = bin_edges(counts.device)
    middle = (edges[1:] + edges[:-1]).abs() / 2
    return (counts.sum(0) * middle).sum() / counts.sum().clamp(min=1)
