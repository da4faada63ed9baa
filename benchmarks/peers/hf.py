"""The MoE block of Hugging Face transformers (Qwen3-MoE's), with each of its experts implementations."""

from importlib import import_module

import torch
from torch import nn

from peers.contestant import Contestant, Layer, Problem, UnavailableError, gradient, memory_size


def transformers(problem: Problem, experts: str) -> Contestant:
    """``Qwen3MoeSparseMoeBlock``, whose router can leave weights unnormalised as top-1 needs it.

    Args:
        problem: what it computes.
        experts: ``eager``, ``grouped_mm`` or ``batched_mm``.

    Raises:
        UnavailableError: ``batched_mm`` would not fit in memory.
        ImportError: no transformers of version 5 or later.
    """
    case = problem.case
    if experts == "batched_mm":
        # It gathers a row's weights for every row, keeps them for backward and gets a gradient of the same size.
        need = 2 * case.rows * 3 * case.dim * case.hidden_dim * problem.x.element_size()
        if need > memory_size(str(problem.x.device)) / 2:
            raise UnavailableError(f"it copies an expert's weights for every row: {need / 2**30:.0f} GiB")
    model = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = import_module("transformers").Qwen3MoeConfig(
        hidden_size=case.dim,
        moe_intermediate_size=case.hidden_dim,
        num_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=case.top_k > 1,
        experts_implementation=experts,
    )
    with torch.device("meta"):
        block = model.Qwen3MoeSparseMoeBlock(config)
    if not hasattr(block.experts, "gate_up_proj"):
        raise UnavailableError("transformers before version 5 has no stacked experts")
    up = block.experts.gate_up_proj = nn.Parameter(problem.up_weight)
    down = block.experts.down_proj = nn.Parameter(problem.down_weight)
    router = block.gate.weight = nn.Parameter(problem.router_weight)
    return Layer(
        problem,
        block,
        lambda x: block(x[None])[0],
        lambda: {"up": gradient(up), "down": gradient(down), "router": gradient(router)},
        lambda x: block.gate(x)[2],
    )
