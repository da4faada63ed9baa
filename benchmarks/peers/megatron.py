"""The MoE layer of megatron-core, with its experts one after the other, which is what needs no GPU library."""

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from peers.contestant import Contestant, Layer, Problem, gradient


def megatron(problem: Problem) -> Contestant:
    """``MoELayer`` with ``SequentialMLP``, in a group of one process.

    Raises:
        ImportError: no megatron-core.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names the GPU libraries that are missing, one by one
        block = _build(problem)
    experts, router = block.experts.local_experts, block.router.weight
    router.data = problem.router_weight
    for expert, up, down in zip(experts, problem.up_weight, problem.down_weight):
        expert.linear_fc1.weight.data, expert.linear_fc2.weight.data = up, down

    def gradients() -> dict[str, Tensor]:
        return {
            "up": torch.stack([gradient(expert.linear_fc1.weight) for expert in experts]),
            "down": torch.stack([gradient(expert.linear_fc2.weight) for expert in experts]),
            "router": gradient(router),
        }

    def route(x: Tensor) -> Tensor:
        chosen: Tensor = block.router(x[:, None])[1]
        return chosen.reshape(-1, problem.case.num_experts).nonzero()[:, 1].reshape(-1, problem.case.top_k)

    return Layer(problem, block, lambda x: block(x[:, None])[0][:, 0], gradients, route)


def _build(problem: Problem) -> Any:
    case = problem.case
    layers = import_module("megatron.core.transformer.moe.moe_layer")
    parallel = import_module("megatron.core.parallel_state")
    linears = import_module("megatron.core.tensor_parallel.layers")
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    if not parallel.model_parallel_is_initialized():
        parallel.initialize_model_parallel()
    config = import_module("megatron.core.transformer.transformer_config").TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=case.dim,
        ffn_hidden_size=case.hidden_dim,
        moe_ffn_hidden_size=case.hidden_dim,
        num_moe_experts=case.num_experts,
        moe_router_topk=case.top_k,
        moe_router_pre_softmax=case.top_k == 1,  # softmax after top-1 would be 1
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=problem.x.dtype,
        bf16=problem.x.dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    spec = import_module("megatron.core.transformer.spec_utils").ModuleSpec(
        module=import_module("megatron.core.transformer.moe.experts").SequentialMLP,
        submodules=import_module("megatron.core.transformer.mlp").MLPSubmodules(
            linear_fc1=linears.ColumnParallelLinear, linear_fc2=linears.RowParallelLinear
        ),
    )
    submodules = layers.MoESubmodules(experts=spec)
    if problem.x.device.type == "cpu":
        submodules.router = _router_that_stays_on_the_cpu()
    return layers.MoELayer(config, submodules, layer_number=1).to(problem.x.device)


def _router_that_stays_on_the_cpu() -> type:
    """Its router, but the weight stays where it is; and a name that it leaves undefined without a GPU library."""
    routers: Any = import_module("megatron.core.transformer.moe.router")
    utils: Any = import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.te_general_gemm = None

    class CpuRouter(routers.TopKRouter):
        def gating(self, inputs: Tensor) -> Tensor:
            logits: Tensor = routers.router_gating_linear(inputs, self.weight, self.bias, torch.float32)
            return logits

    return CpuRouter
