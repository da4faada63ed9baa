"""The two losses of the first sparsely gated layer: squared coefficients of variation, with their own gradients."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.balance.shares import mean_over_tokens, squared_deviation
from moe.config import require_positive
from moe.errors import ConfigError
from moe.types import Routing


@final
@dataclass(frozen=True)
class ImportanceLoss:
    """``CV(importance)^2``, the importance of an expert being the sum over tokens of its weight.

    0 where all experts weigh the same; at most ``E / K - 1`` where each token weighs its K experts alike. The gradient
    passes through the weights of the experts that were chosen, so an expert that nobody chooses gets none. Experts of
    equal importance may still have unequal load: few tokens of large weight, or many of small weight.

    Source: Shazeer et al. 2017 (arXiv 1701.06538, equations 6-7); the variance is over experts, divided by E.
    """

    coefficient: float = 0.1

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient; 0 where no token counts."""
        # A token's experts differ, so each place is written once; the first column takes in what has no expert.
        by_expert = routing.weights.new_zeros(len(routing.weights), routing.num_experts + 1)
        by_expert = by_expert.scatter(1, routing.expert_ids.long() + 1, routing.weights)[:, 1:]
        return squared_variation(by_expert.sum(0))


@final
@dataclass(frozen=True)
class LoadLoss:
    """``CV(load)^2``, the load of an expert being the sum over tokens of how probably a new draw of noise chooses it.

    Smooth, unlike a count, and with a gradient of its own: 0 where all experts are as probable, at most ``E / K - 1``.
    For a router that adds noise to its logits.

    Source: Shazeer et al. 2017 (arXiv 1701.06538, equations 8-11); the variance is over experts, divided by E.
    """

    coefficient: float = 0.1

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient; 0 where no token counts.

        Raises:
            ConfigError: the router adds no noise.
        """
        if routing.selection_probability is None:
            raise ConfigError(
                "balance='load' needs the probability of each choice under noise, which only router='noisy_top_k' has, "
                "and only without a bias rule beside it"
            )
        return squared_variation(mean_over_tokens(routing.selection_probability, routing))


def squared_variation(amounts: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """``CV^2``: the variance of amounts that are not negative over their squared mean; 0 where all are 0."""
    total = amounts.sum()
    some = total > 0
    share = amounts / torch.where(some, total, 1.0)
    return amounts.shape[-1] * squared_deviation(share) * some
