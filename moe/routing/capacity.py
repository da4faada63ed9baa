"""A fixed capacity for each expert, and which assignments it keeps.

Nothing here waits for the device: the capacity is a number on it, and a dropped assignment is an id of -1.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import DropPolicy
from moe.kernels.plan import make_plan
from moe.types import Routing

_NOISE = 1e-6


def limit_capacity(routing: Routing, capacity_factor: float, policy: DropPolicy, top_k: int | None = None) -> Routing:
    """Drop what an expert gets beyond ``ceil(capacity_factor * tokens * K / E)`` assignments, and beyond one at least.

    ``tokens`` are the unmasked ones. Weights of what is kept stay as they were: a token that lost an expert is scaled
    down by it rather than boosted on the others, and one that lost all of them gets an output of 0.

    Args:
        routing: the decision of the router.
        capacity_factor: capacity over an even share; 1.0 leaves no slack.
        policy: which assignments stay, see ``DropPolicy``.
        top_k: K, where the decision has another number of slots than that.

    Returns:
        The same decision with the dropped assignments set to -1.

    Source: GShard (arXiv 2006.16668, section 2.2) and Switch Transformer (arXiv 2101.03961, equation 3) for the
    capacity.
    """
    num_tokens, num_slots = routing.expert_ids.shape
    share = capacity_factor * (num_slots if top_k is None else top_k) / routing.num_experts
    # 0.1 * 3 / 3 * 10 is a little above 1 in binary; such noise must not buy a place, nor take the last one.
    capacity: float | Tensor = max(1, math.ceil(num_tokens * share - _NOISE))
    if routing.token_mask is not None:
        capacity = (routing.token_mask.sum().double() * share - _NOISE).ceil().clamp(min=1)
    if policy is DropPolicy.POSITION:
        rank = rank_in_expert(routing.expert_ids, routing.num_experts)
    else:
        rank = rank_by_score(routing)
    return routing.keep((routing.expert_ids >= 0) & (rank < capacity))


def rank_in_expert(expert_ids: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "T K"]:
    """How many earlier assignments go to the same expert; undefined for -1."""
    plan = make_plan(expert_ids, num_experts)
    starts = plan.expert_offsets[expert_ids.clamp(min=0).long()]
    return plan.rows - starts


def rank_by_score(routing: Routing) -> Int[Tensor, "T K"]:
    """How many assignments to the same expert have a higher score, or the same and come earlier; undefined for -1."""
    ids = routing.expert_ids
    scores: Float[Tensor, "T K"] = routing.scores.detach().gather(1, ids.clamp(min=0).long())
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    by_score = rank_in_expert(ids.flatten()[order][:, None], routing.num_experts).flatten()
    return torch.empty_like(by_score).index_copy_(0, order, by_score).view_as(ids)
