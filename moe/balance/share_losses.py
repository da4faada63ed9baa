"""Losses made of experts' shares of the load and their mean probabilities; notation as in `moe.balance.shares`."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from moe.balance.shares import ShareLoss, squared_deviation


@final
@dataclass(frozen=True)
class SquaredDeviation(ShareLoss):
    """``E * sum_e (f_e - 1/E)^2``: 0 at balance, and equal to the squared coefficient of variation of the load.

    Counts are hard and carry no gradient, so the value uses the counts and the gradient passes to ``P_e``. Its
    gradient is then ``2 E sum_e f_e grad P_e``, that of the Switch loss with twice the coefficient. The factor E
    makes a coefficient mean the same for any number of experts; without it, the loss weakens as 1 / E. At most
    ``E / K - 1``, where the same K experts get every token.

    Source: the sum is that of the text on load balancing which this library set out from (its section 7); the
    gradient is the straight-through identity derived at kexue.fm/archives/10735.
    """

    def combine(
        self, load: Float[Tensor, "*parts E"], probability: Float[Tensor, "*parts E"]
    ) -> Float[Tensor, "*parts"]:
        """The loss of given shares, without its coefficient."""
        through = probability + (load - probability).detach()
        return load.shape[-1] * squared_deviation(through) * (load.sum(-1) > 0)


@final
@dataclass(frozen=True)
class SwitchLoss(ShareLoss):
    """``E * sum_e f_e P_e``: 1 at balance, whatever E and K.

    With the scope "sequence" it is the sequence-wise loss of DeepSeek-V3, but that ``f_e`` counts the experts that were
    chosen, a selection bias included, where the paper compares scores without it.

    Source: Switch Transformer (arXiv 2101.03961, equations 4-6), GShard (arXiv 2006.16668, section 2.2); with K > 1,
    f_e counts every assignment and is divided by K, so that the value does not grow with K. By sequence: DeepSeek-V3
    (arXiv 2412.19437, equations 17-20). Over the step: Qiu et al. 2025 (arXiv 2501.11873).
    """

    def combine(
        self, load: Float[Tensor, "*parts E"], probability: Float[Tensor, "*parts E"]
    ) -> Float[Tensor, "*parts"]:
        """The loss of given shares, without its coefficient."""
        return load.shape[-1] * (load * probability).sum(-1)
