"""The MoE block of torchtitan."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from torch import Tensor, nn

from peers.contestant import Contestant, Layer, Problem, UnavailableError, gradient


def torchtitan(problem: Problem) -> Contestant:
    """Its ``MoE`` on one device.

    Raises:
        UnavailableError: not in bfloat16, to which its experts always convert.
        ImportError: no torchtitan.
    """
    case = problem.case
    if problem.x.dtype != torch.bfloat16:
        raise UnavailableError(f"its experts compute in bfloat16, not in {problem.x.dtype}")
    parts = import_module("torchtitan.models.common.moe")
    dispatchers = import_module("torchtitan.models.common.token_dispatcher")
    with torch.device("meta"):
        block = parts.MoE.Config(
            num_experts=case.num_experts,
            load_balance_coeff=None,
            routed_experts=parts.RoutedExperts.Config(
                inner_experts=parts.GroupedExperts.Config(
                    dim=case.dim, hidden_dim=case.hidden_dim, num_experts=case.num_experts
                ),
                token_dispatcher=dispatchers.LocalTokenDispatcher.Config(
                    num_experts=case.num_experts, top_k=case.top_k
                ),
            ),
            router=parts.TokenChoiceTopKRouter.Config(
                num_experts=case.num_experts,
                gate=parts.Linear.Config(in_features=case.dim, out_features=case.num_experts),
                top_k=case.top_k,
                score_func="softmax",
                route_norm=case.top_k > 1,
            ),
        ).build()
    block.tokens_per_expert_E = torch.zeros(case.num_experts, device=problem.x.device)
    gate_weight, value_weight = (half.contiguous() for half in problem.up_weight.chunk(2, dim=1))
    experts = block.routed_experts.inner_experts
    gate = experts.w1_EFD = nn.Parameter(gate_weight)
    value = experts.w3_EFD = nn.Parameter(value_weight)
    down = experts.w2_EDF = nn.Parameter(problem.down_weight)
    router = block.router.gate.weight = nn.Parameter(problem.router_weight)

    def run(x: Tensor) -> Tensor:
        with _quiet():
            y: Tensor = block(x[None])
        return y[0]

    def route(x: Tensor) -> Tensor:
        with _quiet():
            ids: Tensor = block.router(x[None])[1]
        return ids[0]

    def gradients() -> dict[str, Tensor]:
        up = torch.cat([gradient(gate), gradient(value)], dim=1)
        return {"up": up, "down": gradient(down), "router": gradient(router)}

    return Layer(problem, block, run, gradients, route)


@contextmanager
def _quiet() -> Iterator[None]:
    """Its router asks for float32 autocast, which the CPU does not have: it warns each time and goes on in bfloat16."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast")
        yield
