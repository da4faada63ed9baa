"""Losses that even out the load of experts, each the mean over the tokens of one call.

Notation: T tokens that count, E experts, K experts a token; ``f_e`` the share of assignments that expert e got (sums to
1, no gradient), ``P_e`` the mean over tokens of e's score, normalised over experts (sums to 1, carries the gradient).
"""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import require_positive
from moe.types import Routing


@runtime_checkable
class BalanceLoss(Protocol):
    """Anything that turns a routing decision into a scalar to be minimised."""

    @property
    def coefficient(self) -> float:
        """Factor on the loss."""

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient; 0 where no token counts."""


@final
@dataclass(frozen=True)
class SquaredDeviation:
    """``E * sum_e (f_e - 1/E)^2``: 0 at balance, and equal to the squared coefficient of variation of the load.

    Counts are hard and carry no gradient, so the value uses the counts and the gradient passes to ``P_e``. Its
    gradient is then ``2 E sum_e f_e grad P_e``, that of the Switch loss with twice the coefficient. The factor E
    makes a coefficient mean the same for any number of experts; without it, the loss weakens as 1 / E.

    Source: the sum is that of the text on load balancing which this library set out from (its section 7); the
    gradient is the straight-through identity derived at kexue.fm/archives/10735.
    """

    coefficient: float = 0.01

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient."""
        load, probability = load_share(routing), mean_probability(routing)
        load = probability + (load - probability).detach()
        return routing.num_experts * squared_deviation(load) * _any_token(routing)


@final
@dataclass(frozen=True)
class SwitchLoss:
    """``E * sum_e f_e P_e``: 1 at balance.

    Source: Switch Transformer (arXiv 2101.03961, equations 4-6), GShard (arXiv 2006.16668, section 2.2); with K > 1,
    f_e counts every assignment and is divided by K, so that the value does not grow with K.
    """

    coefficient: float = 0.01

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient."""
        return routing.num_experts * (load_share(routing) * mean_probability(routing)).sum()


@final
@dataclass(frozen=True)
class RouterZLoss:
    """``mean_t (log sum_e exp logit_te)^2``: keeps logits small; it does not balance.

    Source: ST-MoE (Zoph et al. 2022, arXiv 2202.08906, equation 5), with its coefficient.
    """

    coefficient: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient."""
        return _mean_over_tokens(routing.logits.logsumexp(-1).square(), routing)


def squared_deviation(load: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """``sum_e (load_e - 1/E)^2`` of loads that sum to 1, as the source document prints it."""
    return (load - 1 / load.shape[-1]).square().sum()


def load_share(routing: Routing) -> Float[Tensor, " E"]:
    """``f_e``: each expert's share of all assignments; all 0 where there are none. No gradient."""
    counts: Int[Tensor, " E"] = routing.tokens_per_expert()
    return (counts / counts.sum().clamp(min=1)).to(routing.scores.dtype)


def mean_probability(routing: Routing) -> Float[Tensor, " E"]:
    """``P_e``: mean over the tokens that count of each expert's score over the sum of the token's scores.

    The division changes nothing for a softmax. For sigmoid scores it is what keeps the losses honest: without it they
    could be lowered by shrinking every score.
    """
    scores = routing.scores
    normalised = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return _mean_over_tokens(normalised, routing)


def count_tokens(routing: Routing) -> Int[Tensor, ""]:
    """How many tokens count, int64, on the device of the decision."""
    if routing.token_mask is None:
        return torch.full((), routing.scores.shape[0], dtype=torch.int64, device=routing.scores.device)
    return routing.token_mask.sum()


def _mean_over_tokens(values: Float[Tensor, "T ..."], routing: Routing) -> Float[Tensor, "..."]:
    """Mean over the first dimension of the rows that count; 0 where there are none."""
    if routing.token_mask is not None:
        rows = routing.token_mask.view(-1, *(1,) * (values.dim() - 1))
        values = torch.where(rows, values, 0.0)
    return values.sum(0) / count_tokens(routing).clamp(min=1)


def _any_token(routing: Routing) -> Tensor:
    """1 where a token counts, else 0."""
    return (count_tokens(routing) > 0).to(routing.scores.dtype)


LOSSES: dict[str, type[SquaredDeviation] | type[SwitchLoss] | type[RouterZLoss]] = {
    "squared_deviation": SquaredDeviation,
    "switch": SwitchLoss,
    "router_z": RouterZLoss,
}
"""Losses by the name that a ``balance`` config takes."""
