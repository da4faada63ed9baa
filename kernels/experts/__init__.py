"""The experts' operation: every token through its experts, summed by weight.

Sizes: T tokens, D dim, E experts, K choices a token, N = T * K rows, F hidden, U = 2F for a gated activation, else F.
Token t, its k-th expert e, with ``act`` the activation::

    up[t, k] = up_weight[e] @ x[t] + up_bias[e]                                            # kept for backward
    y[t]     = sum_k weights[t, k] * (down_weight[e] @ act(up[t, k]) + down_bias[e])

One operation and not four, so that of the rows only ``up`` is kept: the gathered tokens, the activation and the
experts' outputs are not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe.config import Activation
from moe.errors import DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, check_float, register
from moe.kernels.combine.reference import accumulation_dtype
from moe.kernels.experts import reference
from moe.types import Plan

if HAS_TRITON:
    from moe.kernels.experts import triton_backend


def _fake_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, _, assignments, _, _, up_weight, _, _, _, _, keep_up, _, _ = inputs
    return torch.empty_like(x), x.new_empty(assignments.shape[0] if keep_up else 0, up_weight.shape[1])


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    _, x, weights, _, _, _, _, *parameters, _, needs, weight_grad_dtype, _ = inputs
    dtypes = (x.dtype, weights.dtype, *[weight_grad_dtype or x.dtype] * 4)
    return tuple(
        x.new_empty(tensor.shape if needed and tensor is not None else 0, dtype=dtype)
        for tensor, needed, dtype in zip((x, weights, *parameters), needs, dtypes)
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.activation, _, ctx.weight_grad_dtype, ctx.batch_invariant = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # none of ``up`` is wanted: zeros would be as large as what was saved


def _register_autograd(op: CustomOpDef, backward_op: CustomOpDef) -> None:
    def backward(ctx, grad, grad_up):  # type: ignore[no-untyped-def] # noqa: ARG001
        if grad is None:
            return (None,) * 13
        *plan, up_weight, down_weight, up_bias, down_bias, up = ctx.saved_tensors
        parameters = (up_weight, down_weight, up_bias, down_bias)
        needed = ctx.needs_input_grad
        needs = [needed[0], needed[1], *needed[5:9]]
        options = (ctx.activation, needs, ctx.weight_grad_dtype, ctx.batch_invariant)
        grads = backward_op(grad.contiguous(), *plan, up, *parameters, *options)
        wanted = [each if need else None for each, need in zip(grads, needs)]
        return *wanted[:2], None, None, None, *wanted[2:], None, None, None, None

    op.register_autograd(backward, setup_context=_setup_context)


_FORWARD = register(
    "experts", _fake_forward, reference.experts_forward, triton_backend.experts_forward if HAS_TRITON else None
)
_BACKWARD = register(
    "experts_backward",
    _fake_backward,
    reference.experts_backward,
    triton_backend.experts_backward if HAS_TRITON else None,
)
for _backend, _op in _FORWARD.items():
    _register_autograd(_op, _BACKWARD[_backend])


def run_experts(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Activation = Activation.SWIGLU,
    recompute_up: bool = False,
    weight_grad_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Send each token through its experts and sum their outputs by weight; 0 for a token without an expert.

    Backward keeps ``x``, the routing and ``up (N, U)``, or without ``up`` computes it again. Sums are float32 (float64
    for float64) and in a fixed order: results repeat to the last bit. Second derivatives are not defined.

    Args:
        x: ``(T, D)`` bfloat16, float16 or float32; on the CPU also float64.
        weights: ``(T, K)`` float32; float64 where ``x`` is. Those of no expert are not read; their gradient is 0.
        plan: of T tokens, K choices, E experts; on the device of ``x``.
        up_weight: ``(E, U, D)``, dtype of ``x``; U = 2F for a gated activation, the gate's F rows first, else F.
        down_weight: ``(E, D, F)``, dtype of ``x``.
        up_bias: ``(E, U)``, dtype of ``x``.
        down_bias: ``(E, D)``, dtype of ``x``.
        activation: between the two products.
        recompute_up: keep only ``x`` and the routing for backward, and compute ``up`` again there.
        weight_grad_dtype: of the gradients of weights and biases, such as float32 for bfloat16 parameters whose
            ``grad_dtype`` is float32; None for that of ``x``.
        batch_invariant: let a token's output and its gradient depend on that token alone, to the last bit. On the CPU
            this costs time (see docs/explanation/determinism.md); on a GPU it is always so.

    Returns:
        ``(T, D)``, dtype of ``x``.

    Raises:
        ShapeError: the shapes do not fit together, there is no expert, or on the CPU the plan's offsets do not ascend
            from 0 to at most N.
        DtypeError: ``x`` is not floating point or not for the kernels of its device; another tensor does not match it.
    """
    _check(x, weights, plan, up_weight, down_weight, up_bias, down_bias, activation)
    inputs = (x, weights, up_weight, down_weight, up_bias, down_bias)
    differentiable = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)
    routing = (weights, plan.assignments, plan.expert_offsets, plan.rows)
    operands = (x, *routing, up_weight, down_weight, up_bias, down_bias)
    y, _ = _FORWARD[backend_of(x)](
        *(None if each is None else each.contiguous() for each in operands),
        activation.value,
        differentiable and not recompute_up,
        weight_grad_dtype,
        batch_invariant,
    )
    return y


def _check(
    x: Tensor,
    weights: Tensor,
    plan: Plan,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
) -> None:
    check_float("x", x)
    if down_weight.ndim != 3:
        raise ShapeError(f"down_weight has shape {tuple(down_weight.shape)}, must be (experts, dim, hidden)")
    if down_weight.shape[0] == 0:
        raise ShapeError(f"down_weight has 0 experts, shape {tuple(down_weight.shape)}, must have at least 1")
    num_experts, dim, hidden_dim = down_weight.shape
    up_dim = 2 * hidden_dim if activation.is_gated else hidden_dim
    expected = {
        "x": (x, (plan.rows.shape[0], dim), x.dtype),
        "weights": (weights, tuple(plan.rows.shape), accumulation_dtype(x.dtype)),
        "up_weight": (up_weight, (num_experts, up_dim, dim), x.dtype),
        "down_weight": (down_weight, (num_experts, dim, hidden_dim), x.dtype),
        "up_bias": (up_bias, (num_experts, up_dim), x.dtype),
        "down_bias": (down_bias, (num_experts, dim), x.dtype),
        "plan.expert_offsets": (plan.expert_offsets, (num_experts + 1,), torch.int32),
        "plan.assignments": (plan.assignments, (plan.rows.numel(),), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, must be {shape}: down_weight is (experts, dim, hidden) = "
                f"{tuple(down_weight.shape)}, activation {activation.value}, the plan of {plan.rows.shape[0]} tokens"
            )
        if tensor.dtype != dtype:
            raise DtypeError(f"{name} has dtype {tensor.dtype}, must be {dtype} for x of {x.dtype}")
