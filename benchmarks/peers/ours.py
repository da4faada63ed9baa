"""This library's layer."""

from typing import Any

import moe
from peers.contestant import Contestant, Layer, Problem, gradient


def ours(problem: Problem, **options: Any) -> Contestant:
    """``moe.MoE`` without balancing, with further options of its."""
    case = problem.case
    layer = moe.MoE(
        case.dim,
        case.hidden_dim,
        case.num_experts,
        case.top_k,
        balance=(),
        device=problem.x.device,
        dtype=problem.x.dtype,
        **options,
    )
    up, down, router = layer.experts.up_weight, layer.experts.down_weight, layer.router.weight
    up.data, down.data, router.data = problem.up_weight, problem.down_weight, problem.router_weight
    return Layer(
        problem,
        layer,
        layer,
        lambda: {"up": gradient(up), "down": gradient(down), "router": gradient(router)},
        lambda x: layer.router(x).expert_ids,
    )
