"""Null experts: choices that compute nothing, so that a token may take fewer real experts than K.

Sizes: T tokens, D dim, S slots a token, E real experts, Z null experts with the ids E .. E + Z - 1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe.errors import ConfigError
from moe.types import Routing


def count_null_experts(num_experts: int, null_ratio: Any) -> int:
    """Z, so that ``Z / (E + Z)`` is the ratio.

    Raises:
        ConfigError: the ratio is not in [0, 1), or gives no whole number.
    """
    if isinstance(null_ratio, bool) or not isinstance(null_ratio, int | float) or not 0 <= null_ratio < 1:
        raise ConfigError(
            f"null_ratio={null_ratio!r} must be at least 0 and less than 1: the share of experts that compute nothing"
        )
    exact = num_experts * null_ratio / (1 - null_ratio)
    count = round(exact)
    # 1/3 of 24 experts are 8 although 1/3 is rounded, and 0.333 is meant to be 1/3.
    if abs(count / (num_experts + count) - null_ratio) > 1e-3 or (count == 0) != (null_ratio == 0):
        near = sorted({max(1, int(exact)), int(exact) + 1})
        ratios = " or ".join(f"{n / (num_experts + n):.4g} ({n})" for n in near)
        raise ConfigError(
            f"null_ratio={null_ratio} of num_experts={num_experts} real experts would be {exact:.2f} null ones; "
            f"try {ratios}"
        )
    return count


def without_null(routing: Routing) -> Routing:
    """The decision without the null experts, as the real ones get it; itself where there are none."""
    if routing.num_null_experts == 0:
        return routing
    return routing.keep(routing.expert_ids < routing.num_real_experts)


def null_weight(routing: Routing) -> Float[Tensor, " T"]:
    """The weight of each token that its null experts have together, with gradients."""
    is_null = routing.expert_ids >= routing.num_real_experts
    return torch.where(is_null, routing.weights, 0.0).sum(-1)
