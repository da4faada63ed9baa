"""A loss that sets how many experts a token gets, for a router that lets the scores decide.

Notation as in `moe.balance.shares`.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.balance.shares import load_share, mean_over_tokens
from moe.balance.step_counts import StepCounts
from moe.config import require_positive
from moe.errors import ConfigError
from moe.types import Routing

_MIN_STRENGTH, _MAX_STRENGTH = 1e-30, 1e30
"""Bounds that no training comes near: a strength of 0 could never grow again, and infinity times 0 is no number."""


@final
@dataclass(frozen=True)
class AdaptiveL1:
    """``strength * E * sum_e f_e * mean_t score_te``: fewer experts a token, and fewer tokens for the busiest.

    After each step the strength is multiplied by ``growth`` where tokens have more than K experts on average, divided
    by it where they have fewer, and left alone where they have exactly K. So there is no scale to be tuned; where the
    strength settles depends on E, K and the model's loss. The factor on each score, ``E f_e``, is 1 at balance.

    The paper divides counts by K T and not by what was assigned; that is a factor common to all experts, which the
    strength absorbs. It has one strength for a model, and here each layer has its own.

    Args:
        strength: before the first step.
        growth: factor a step, above 1.

    Raises:
        ConfigError: a strength that is not positive, a growth of at most 1.

    Source: ReMoE (Wang et al. 2024, arXiv 2412.14711), with its values.
    """

    strength: float = 1e-8
    growth: float = 1.2

    def __post_init__(self) -> None:
        require_positive(strength=self.strength, growth=self.growth)
        if self.growth <= 1:
            raise ConfigError(f"growth={self.growth} must be above 1")

    def initial_state(self) -> Float[Tensor, "1"]:
        """The strength."""
        return torch.tensor([self.strength], dtype=torch.float32)

    def __call__(self, routing: Routing, state: Float[Tensor, "1"]) -> Float[Tensor, ""]:
        """The loss, its strength included; 0 where no token counts."""
        scores = mean_over_tokens(routing.scores, routing)
        return state[0].to(scores.dtype) * routing.num_experts * (load_share(routing) * scores).sum()

    def updated(self, state: Float[Tensor, "1"], counts: StepCounts) -> Float[Tensor, "1"]:
        """The strength for the next step."""
        # sign((1 - k/E) - sparsity), with sparsity = 1 - assignments / (tokens * E), in integers.
        excess = counts.tokens_per_expert.sum() - counts.top_k * counts.tokens
        return (state * self.growth ** excess.sign().to(state.dtype)).clamp(_MIN_STRENGTH, _MAX_STRENGTH)
