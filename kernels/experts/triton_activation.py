"""The experts' activation on GPUs, forward and backward: one pass over the rows each, no atomics.

Rows of no expert are not read, and what the result holds in them is not written.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# A warp reads 512 bytes of a half-precision row at once, so that a row's sum stays within a warp. The tile must have
# at least as many elements as the program has threads, see can_overwrite.
BLOCK_ROWS = 8
BLOCK_COLUMNS = 256
NUM_WARPS = 4
# Sizes that change from batch to batch and say nothing about alignment: one compilation serves all of them.
SIZES = ["num_rows", "num_experts"]


@triton.jit
@no_type_check
def _activation(x, ACTIVATION: tl.constexpr):
    """The activation (of the gate, where there is one) and its derivative; NaN stays NaN, as in PyTorch."""
    if ACTIVATION == "swiglu":
        sigmoid = 1 / (1 + tl.exp(-x))
        value = x * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # sqrt(1/2)
        value = x * below
        slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu_squared", "an activation without a formula here")
        value = tl.where(x <= 0, 0.0, x)
        slope = 2 * value
        value *= value
    return value, slope


def can_overwrite(hidden_dim: int, activation: str) -> bool:
    """Whether results of :func:`activation_backward` may be stored over its operands.

    They may where the thread that stores an element is the one that loaded it. Triton deals a tile out to threads by
    how many neighbours an address is aligned for, for each load and store apart. Without a gate all addresses are
    alike. With one, rows of ``up`` are twice as long: addresses are alike where ``hidden_dim`` is a multiple of 16, the
    only factor that Triton looks for in an argument. Else elements are loaded in pairs, because of the gate, and some
    stored one by one, by another thread or even another warp. ``tests/kernels/test_codegen.py`` reads the layouts.
    """
    return activation != "swiglu" or hidden_dim % 16 == 0


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _activation_kernel(
    up,
    expert_offsets,
    hidden,
    num_experts,
    hidden_dim,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_ROWS
    num_owned = tl.load(expert_offsets + num_experts)
    if first_row >= num_owned:
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < num_owned)[:, None] & (column < hidden_dim)[None, :]
    row_start = row.to(tl.int64)[:, None] * hidden_dim
    source = up + (2 * row_start if ACTIVATION == "swiglu" else row_start) + column[None, :]
    value, _ = _activation(tl.load(source, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if ACTIVATION == "swiglu":
        value *= tl.load(source + hidden_dim, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden + row_start + column[None, :], value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _store_grad_up(source, target, grad, readable, hidden_dim, ACTIVATION: tl.constexpr):
    """Store the gradient of a tile of the up projection, given the activation's; return the activation."""
    value, slope = _activation(tl.load(source, mask=readable, other=0.0).to(tl.float32), ACTIVATION)
    if ACTIVATION == "swiglu":
        linear = tl.load(source + hidden_dim, mask=readable, other=0.0).to(tl.float32)
        tl.store(target + hidden_dim, (grad * value).to(target.dtype.element_ty), mask=readable)
        value *= linear
        slope *= linear
    tl.store(target, (grad * slope).to(target.dtype.element_ty), mask=readable)
    return value


@triton.jit
@no_type_check
def _bias_dots(
    grad,
    bias,
    expert_offsets,
    row,
    token,
    owned,
    num_experts,
    dim,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """For each row of a tile, its token's gradient times its expert's bias."""
    group = tl.arange(0, BLOCK_GROUPS)
    end = tl.load(expert_offsets + 1 + group, mask=group < num_experts, other=2147483647)
    expert = tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1)
    grad_start = token.to(tl.int64)[:, None] * dim
    bias_start = expert.to(tl.int64)[:, None] * dim
    dots = tl.zeros((row.shape[0], BLOCK_COLUMNS), tl.float32)
    for first in range(0, dim, BLOCK_COLUMNS):
        column = (first + tl.arange(0, BLOCK_COLUMNS))[None, :]
        inside = owned[:, None] & (column < dim)
        dy = tl.load(grad + grad_start + column, mask=inside, other=0.0).to(tl.float32)
        dots += dy * tl.load(bias + bias_start + column, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(dots, axis=1)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _activation_backward_kernel(
    up,
    grad_hidden,
    weights,
    assignments,
    expert_offsets,
    grad,
    bias,
    grad_up,
    weighted,
    grad_weights,
    num_rows,
    num_experts,
    hidden_dim,
    dim,
    ACTIVATION: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program owns whole rows, so that each sum over a row has one order. Results may be operands, see above."""
    first_row = tl.program_id(0) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    num_owned = tl.load(expert_offsets + num_experts)
    owned = row < num_owned
    assigned = tl.load(assignments + row, mask=inside, other=0)
    if first_row >= num_owned:
        tl.store(grad_weights + assigned, tl.zeros((BLOCK_ROWS,), tl.float32), mask=inside)
        return
    weight = tl.load(weights + assigned, mask=owned, other=0.0)[:, None]
    row_start = row.to(tl.int64)[:, None] * hidden_dim
    up_start = 2 * row_start if ACTIVATION == "swiglu" else row_start
    dots = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, hidden_dim, BLOCK_COLUMNS):
        column = (first + tl.arange(0, BLOCK_COLUMNS))[None, :]
        readable = owned[:, None] & (column < hidden_dim)
        dhidden = tl.load(grad_hidden + row_start + column, mask=readable, other=0.0).to(tl.float32)
        value = _store_grad_up(
            up + up_start + column, grad_up + up_start + column, weight * dhidden, readable, hidden_dim, ACTIVATION
        )
        tl.store(weighted + row_start + column, (weight * value).to(weighted.dtype.element_ty), mask=readable)
        dots += dhidden * value
    total = tl.sum(dots, axis=1)
    if HAS_BIAS:
        total += _bias_dots(
            grad, bias, expert_offsets, row, assigned // TOP_K, owned, num_experts, dim, BLOCK_GROUPS, BLOCK_COLUMNS
        )
    tl.store(grad_weights + assigned, total, mask=inside)


def activation_forward(up: Tensor, expert_offsets: Tensor, activation: str) -> Tensor:
    """Apply the activation to the rows that have an expert.

    Args:
        up: ``(N, U)``, contiguous.
        expert_offsets: ``(E + 1,)`` int32.
        activation: a value of :class:`moe.config.Activation`.

    Returns:
        ``(N, F)``, dtype of ``up``; a row of no expert holds anything.
    """
    num_rows = up.shape[0]
    hidden_dim = up.shape[1] // 2 if activation == "swiglu" else up.shape[1]
    hidden = up.new_empty(num_rows, hidden_dim)
    if num_rows == 0:
        return hidden
    wrap_triton(_activation_kernel)[(triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(hidden_dim, BLOCK_COLUMNS))](
        up,
        expert_offsets,
        hidden,
        expert_offsets.shape[0] - 1,
        hidden_dim,
        ACTIVATION=activation,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return hidden


def activation_backward(
    up: Tensor,
    grad_hidden: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    grad: Tensor,
    down_bias: Tensor | None,
    grad_up: Tensor,
    weighted: Tensor,
    activation: str,
) -> Tensor:
    """The gradients on both sides of the activation, and the operand of the down weight's gradient, in one pass.

    Rows of no expert are not touched, except that their weights' gradient is exactly zero.

    Args:
        up: ``(N, U)``, the up projection before the activation, contiguous.
        grad_hidden: ``(N, F)``, the activation's gradient before routing weights, ``grad[t] @ down_weight``,
            contiguous.
        weights: ``(T, K)`` float32, contiguous.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.
        grad: ``(T, D)``, the output's gradient, contiguous; read only with ``down_bias``.
        down_bias: ``(E, D)`` contiguous, or None.
        grad_up: ``(N, U)``, contiguous; receives the gradient of ``up``. May be ``up`` itself if :func:`can_overwrite`.
        weighted: ``(N, F)``, contiguous; receives the activation times the routing weight of each row. May be
            ``grad_hidden`` itself if :func:`can_overwrite`.
        activation: a value of :class:`moe.config.Activation`.

    Returns:
        ``(T, K)`` float32, the gradient of ``weights``.
    """
    num_rows, hidden_dim = grad_hidden.shape
    num_experts = expert_offsets.shape[0] - 1
    grad_weights = torch.empty_like(weights)
    if num_rows == 0:
        return grad_weights
    wrap_triton(_activation_backward_kernel)[(triton.cdiv(num_rows, BLOCK_ROWS),)](
        up,
        grad_hidden,
        weights,
        assignments,
        expert_offsets,
        grad,
        grad if down_bias is None else down_bias,  # a pointer is needed, and not read without a bias
        grad_up,
        weighted,
        grad_weights,
        num_rows,
        num_experts,
        hidden_dim,
        grad.shape[1],
        ACTIVATION=activation,
        TOP_K=weights.shape[1],
        HAS_BIAS=down_bias is not None,
        BLOCK_GROUPS=triton.next_power_of_2(num_experts),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=NUM_WARPS,
    )
    return grad_weights
