"""Decisions with another number of experts for each token, in a table of fixed width."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import require_positive_integer
from moe.kernels.route import choose


def fill_slots(
    values: Float[Tensor, "T E"], is_chosen: Bool[Tensor, "T E"], num_slots: int
) -> Int[Tensor, "T {num_slots}"]:
    """The chosen experts of each token in its slots, int32.

    Args:
        values: what makes an expert better than another, above -inf for those chosen.
        is_chosen: which experts the token has.
        num_slots: how many it can have; beyond that only the best stay.

    Returns:
        Expert ids, those of the largest values first, of equals the lower id first, then -1.
    """
    values = values.masked_fill(~is_chosen, -torch.inf)
    best = choose(values, values, None, num_slots, False, 1, 1)
    return best.masked_fill(~is_chosen.gather(1, best.long()), -1)


def count_slots(num_experts: int, max_experts: int | None) -> int:
    """How many slots a token needs for at most ``max_experts`` experts, None for no limit.

    Raises:
        ConfigError: ``max_experts`` is not a positive whole number.
    """
    if max_experts is None:
        return num_experts
    require_positive_integer(max_experts=max_experts)
    return min(num_experts, max_experts)
