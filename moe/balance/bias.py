"""Balance without a loss: a bias for each expert, added to its score for selection only."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from moe.config import require_positive


@final
@dataclass(frozen=True)
class ScoreBias:
    """Raise the bias of experts that got less than the mean load, lower it for those that got more, by a fixed step.

    ``b_e += rate * sign(mean(c) - c_e)`` with ``c_e`` the assignments of the whole optimizer step, accumulation
    included. Route with the old bias, then update: the other order would let a token's routing depend on later
    tokens.

    Args:
        rate: step; scores lie in 0..1. Published: 0.001 for runs of many thousand steps, which is too slow for some
            hundred.

    Source: Wang et al. 2024 (arXiv 2408.15664, algorithm 1); DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(rate=self.rate)

    def updated(self, bias: Float[Tensor, " E"], tokens_per_expert: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
        """The bias for the next step.

        Args:
            bias: float32.
            tokens_per_expert: integer counts of the step that has ended.
        """
        # c_e * E against sum(c), in integers: no rounding decides a sign.
        excess = tokens_per_expert * tokens_per_expert.numel() - tokens_per_expert.sum()
        return bias - self.rate * excess.sign()
