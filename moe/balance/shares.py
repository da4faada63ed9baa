"""Shares of load and probability, over a call or over each of its sequences, and the losses made of the two.

Notation: T tokens that count, E experts, K experts a token, S sequences; ``f_e`` the share of assignments that expert e
got (sums to 1, no gradient), ``P_e`` the mean over tokens of e's score, normalised over experts (sums to 1, carries the
gradient). With ``by_sequence`` each function answers for every sequence, in a first dimension of S.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import option, require_positive
from moe.types import Routing, count_experts


class Scope(StrEnum):
    """Over which tokens a loss asks for balance. The wider, the more experts may differ in what they are good for."""

    CALL = "call"
    """Those of one forward call: a micro-batch on one device."""
    SEQUENCE = "sequence"
    """Those of each sequence by itself; the mean over sequences, weighted by the tokens that count."""
    GLOBAL = "global"
    """Those of the whole optimizer step on all devices (Qiu et al. 2025, arXiv 2501.11873)."""


@dataclass(frozen=True)
class ShareLoss(ABC):
    """A loss made of each expert's share of the load and its mean probability.

    Args:
        coefficient: factor on the loss.
        scope: over which tokens the shares are, see `Scope`.

    Raises:
        ConfigError: a coefficient that is not positive, an unknown scope.
    """

    coefficient: float = 0.01
    scope: str = Scope.CALL

    def __post_init__(self) -> None:
        require_positive(coefficient=self.coefficient)
        object.__setattr__(self, "scope", option(Scope, "scope", self.scope))

    @abstractmethod
    def combine(
        self, load: Float[Tensor, "*parts E"], probability: Float[Tensor, "*parts E"]
    ) -> Float[Tensor, "*parts"]:
        """The loss of given shares, without its coefficient; its gradient is linear in ``probability``.

        Args:
            load: shares that sum to 1 over the experts, without gradient; all 0 where nothing was assigned, which makes
                the loss 0.
            probability: mean probabilities with their gradient. They sum to 1, but where ``load`` is of a whole step
                they may be this call's part of the mean.
        """

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss of one call, without its coefficient; with the scope "global" as if the call were the whole step."""
        if self.scope == Scope.SEQUENCE:
            load, probability = load_share(routing, by_sequence=True), mean_probability(routing, by_sequence=True)
            return mean_over_sequences(self.combine(load, probability), routing)
        return self.combine(load_share(routing), mean_probability(routing))


def squared_deviation(load: Float[Tensor, "*parts E"]) -> Float[Tensor, "*parts"]:
    """``sum_e (load_e - 1/E)^2`` of loads that sum to 1, as the source document prints it."""
    return (load - 1 / load.shape[-1]).square().sum(-1)


def load_share(routing: Routing, *, by_sequence: bool = False) -> Float[Tensor, "*S E"]:
    """``f_e``: each expert's share of all assignments; all 0 where there are none. No gradient."""
    counts = _count_by_sequence(routing) if by_sequence else routing.tokens_per_expert()
    dtype = routing.scores.dtype  # the quotient of two integers would be float32 in a float64 layer too
    return counts.to(dtype) / counts.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def mean_probability(routing: Routing, *, by_sequence: bool = False) -> Float[Tensor, "*S E"]:
    """``P_e``: mean over the tokens that count of each expert's score over the sum of the token's scores.

    The division changes nothing for a softmax. For sigmoid scores it is what keeps the losses honest: without it they
    could be lowered by shrinking every score.
    """
    return mean_over_tokens(_normalised(routing), routing, by_sequence=by_sequence)


def probability_sum(routing: Routing) -> Float[Tensor, " E"]:
    """`mean_probability` times the tokens that count: what adds up over the calls of a step."""
    return _sum_over_tokens(_normalised(routing), routing)


def count_tokens(routing: Routing, *, by_sequence: bool = False) -> Int[Tensor, "*S"]:
    """How many tokens count, int64, on the device of the decision."""
    T, S = len(routing.scores), routing.num_sequences
    if routing.token_mask is not None:
        return routing.token_mask.reshape(S, T // S).sum(-1) if by_sequence else routing.token_mask.sum()
    shape = (S,) if by_sequence else ()
    return torch.full(shape, T // S if by_sequence else T, dtype=torch.int64, device=routing.scores.device)


def mean_over_tokens(
    values: Float[Tensor, "T ..."], routing: Routing, *, by_sequence: bool = False
) -> Float[Tensor, "..."]:
    """Mean over the first dimension of the rows that count; 0 where there are none."""
    sums = _sum_over_tokens(values, routing, by_sequence=by_sequence)
    count = count_tokens(routing, by_sequence=by_sequence).clamp(min=1)
    return sums / count.reshape((*count.shape, *(1,) * (sums.dim() - count.dim())))


def mean_over_sequences(values: Float[Tensor, " S"], routing: Routing) -> Float[Tensor, ""]:
    """Mean of a value a sequence, weighted by the tokens that count; 0 where there are none."""
    count = count_tokens(routing, by_sequence=True)
    return (values * count).sum() / count.sum().clamp(min=1)


def _sum_over_tokens(values: Tensor, routing: Routing, *, by_sequence: bool = False) -> Tensor:
    if routing.token_mask is not None:
        rows = routing.token_mask.view(-1, *(1,) * (values.dim() - 1))
        values = torch.where(rows, values, 0.0)
    if by_sequence:
        S = routing.num_sequences
        return values.reshape(S, len(values) // S, *values.shape[1:]).sum(1)
    return values.sum(0)


def _normalised(routing: Routing) -> Tensor:
    scores = routing.scores
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _count_by_sequence(routing: Routing) -> Tensor:
    """``(S, E)`` int64; exact as any count of integers is."""
    S, E = routing.num_sequences, routing.num_experts
    ids = routing.expert_ids.long().reshape(S, len(routing.expert_ids) // S, -1) if S > 1 else routing.expert_ids[None]
    first = E * torch.arange(S, device=ids.device)[:, None, None]
    return count_experts(torch.where(ids >= 0, ids + first, -1), S * E).view(S, E)
