"""Quantile balancing one step ahead: the bias is found for the router that the next batch will meet.

A bias that is found from the scores of a step suits the router of that step, but the optimizer has moved the router
since. Here some tokens of the step are scored again with the new weight, and the quantile is taken of those margins.
Nothing leaks: these tokens were trained on already, with the old bias.

Notation as in `moe.balance.quantile`; t counts steps from 0.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.balance.step_counts import StepCounts
from moe.config import require_positive, require_positive_integer
from moe.errors import ConfigError
from moe.kernels.margins import quantile


@final
@dataclass(frozen=True)
class LookaheadBias:
    """Move each bias by a part of the K/E quantile of its expert's margins under the router's new weight.

    ``b_e += gain_t * quantile_{K/E}(m_e)``, then centred, with ``gain_t = max(gain, 1 / (1 + t / slowdown))``: whole
    moves at first, when the router changes fast, and smaller ones later, when the noise of a batch is what is left. As
    any quantile it has no scale, so it suits any score function.

    After each step the layer scores ``sample`` tokens of each of its calls once more: one product of the router, and as
    many rows of its input are kept until then. With several devices each keeps its own, and their histograms add up.

    Args:
        gain: the part of each move that is made in the long run, in (0, 1].
        slowdown: steps after which half a move is made.
        sample: tokens of each call, evenly spaced over it; all where it has fewer.

    Raises:
        ConfigError: an argument is not positive, or gain above 1.

    Source: ours; the quantile is J. Su's (kexue.fm/archives/11619).
    """

    gain: float = 0.3
    slowdown: float = 100.0
    sample: int = 512

    needs_margins: ClassVar[bool] = False
    state_rows: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(gain=self.gain, slowdown=self.slowdown)
        require_positive_integer(sample=self.sample)
        if self.gain > 1:
            raise ConfigError(f"gain={self.gain} must be at most 1")

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "1 E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "1 E"]]:
        """The bias for the next step, and in the state how many steps there were.

        Raises:
            ConfigError: the counts are without margins.
        """
        if counts.margins is None:
            raise ConfigError("counts.margins=None must be a histogram: a LookaheadBias moves by margins")
        gain = (1 / (1 + state[0] / self.slowdown)).clamp(min=self.gain)
        moved = bias + gain * quantile(counts.margins, counts.top_k / len(bias))
        some = counts.tokens > 0
        return torch.where(some, moved - moved.mean(), bias), torch.where(some, state + 1, state)
