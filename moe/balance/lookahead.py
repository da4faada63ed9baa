"""Quantile balancing one step ahead, then small steps by counts.

A bias that is found from the scores of a step suits the router of that step, but the optimizer has moved the router
since, most of all at the beginning. So tokens of the step are scored again with the new weight, and the quantile is
taken of those margins. Nothing leaks: they were trained on already, with the old bias. Later the router is slower, and
the noise of each batch is what is left; a quantile takes all of it into the bias, a small step by the counts little.
How small is read from the margins now and then, so that a late step costs hardly more than counting.

Notation as in `moe.balance.quantile` and `moe.balance.bias`; t counts steps from 0.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor, addcmul, maximum, minimum, stack, where

from moe.balance.bias import excess, root_mean_square
from moe.balance.protocols import MarginRequest
from moe.balance.step_counts import StepCounts
from moe.config import require_positive, require_positive_integer
from moe.errors import ConfigError
from moe.kernels.margins import quantile

_LATE_PERIOD = 8
"""Of so many late steps one counts margins."""


@final
@dataclass(frozen=True)
class LookaheadBias:
    """First to the K/E quantile of each expert's margins under the router's new weight, then in steps by the counts.

    In the first ``early_steps`` the move is ``quantile_{K/E}(m_e)`` with margins under the new weight. After them it is
    ``rate * median(s) * (1/E - f_e) / RMS(f - 1/E)``, a step of `RmsBias`, but not above ``limit * s_e * |1 - E f_e|``.
    There ``s_e`` is twice how far it is from the bias that gives an expert its share to one that gives it half of that
    more or less, whichever is nearer; or the way to its share where that is longer. (Where K/E is above 1/2, half of
    what is left counts.) So a layer that is nearly right moves little, an expert of narrow margins less than others,
    and one that nobody chooses more. The bias is centred after each step. Steps are measured by margins, so the same
    numbers suit every score function.

    The layer scores ``sample`` tokens of each of its calls once more after an early step: a product of the router, and
    as many rows of its input are kept until then. In one of eight late steps it counts the margins of as many decisions
    for ``s``, which stays until the next time. With several devices each takes its own tokens, and their histograms add
    up; the counts are of all tokens.

    Args:
        rate: root mean square of a late step, over the median of ``s``.
        limit: the longest late step, over the one that would make up for all an expert lacks.
        early_steps: how many there are; twice as many as those in which the learning rate warms up, or more.
        sample: tokens of each call at most, evenly spaced over it. Of n tokens an expert should get ``n K / E``, and
            chance adds or takes the root of that.

    Raises:
        ConfigError: an argument is not positive.

    Source: ours; the quantile is J. Su's (kexue.fm/archives/11619), the normalised step too (kexue.fm/archives/10757).
    """

    rate: float = 0.4
    limit: float = 1.0
    early_steps: int = 100
    sample: int = 2048

    state_rows: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(rate=self.rate, limit=self.limit)
        require_positive_integer(early_steps=self.early_steps, sample=self.sample)

    def margins_at(self, step: int) -> MarginRequest | None:
        """Early those under the new weight, late in one of eight steps those of the decisions."""
        if step < self.early_steps:
            return MarginRequest(self.sample, ahead=True)
        if (step - self.early_steps) % _LATE_PERIOD == 0:
            return MarginRequest(self.sample)
        return None

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "1 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "1 E"]]:
        """The bias for the next step, and the spreads ``s``.

        Raises:
            ConfigError: the counts are without the margins that ``margins_at`` asked for.
        """
        if counts.step < self.early_steps:
            moved = bias + quantile(_given_margins(counts), counts.share)
        else:
            if self.margins_at(counts.step) is not None:
                margins = _given_margins(counts)
                state = where(margins.sum() > 0, _spread(margins, counts.share), state)
            spread, c = state[0], counts.tokens_per_expert
            off = excess(c).float()  # E * sum(c) times f - 1/E
            by_rate = self.rate * spread.median() / root_mean_square(off)
            by_limit = self.limit / c.sum().clamp(min=1) * spread
            moved = addcmul(bias, off, minimum(by_rate, by_limit), value=-1)
        return where(counts.tokens > 0, moved - moved.mean(), bias), state


def _given_margins(counts: StepCounts) -> Int[Tensor, "E bins"]:
    if counts.margins is None:
        raise ConfigError(f"margins=None of step={counts.step} must be the histogram that the rule asked for")
    return counts.margins


def _spread(margins: Int[Tensor, "E bins"], share: Float[Tensor, ""]) -> Float[Tensor, "1 E"]:
    """Twice the way from each bias for the share to one for half less or more, the nearer, or the way to the former."""
    half = minimum(share, 1 - share) / 2
    # The nearer one, since a step that takes the slope for less steep than it is overshoots.
    low, middle, high = quantile(margins.expand(3, -1, -1), stack([share - half, share, share + half])[:, None])
    return maximum(2 * minimum(middle - low, high - middle), middle.abs())[None]
