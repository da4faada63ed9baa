"""The router's logits on GPUs. A tile's shape never depends on the number of tokens, so a token's logits do not either.

Sums run over the inner dimension in ascending order within one program; the weight's gradient, whose inner dimension is
the tokens, is summed over a few fixed ranges of tokens and then over these. No atomics.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moe.kernels.triton_gpus import require_supported_gpu

SPLIT_TOKENS = 1024  # the weight's gradient: tokens of a range, as long as that makes
MAX_SPLITS = 16  # no more ranges than these


@triton.jit
@no_type_check
def _halves(values):
    """Three bfloat16 tiles, smallest first, whose sum is a float32 tile to the last bit (8 of 24 each).

    A number that rounds to an infinite bfloat16, from 3.396e38 on, counts as infinite.
    """
    high = values.to(tl.bfloat16)
    whole = high.to(tl.float32)
    rest = tl.where(tl.abs(whole) == float("inf"), 0.0, values - whole)  # inf - inf is NaN
    middle = rest.to(tl.bfloat16)
    return (rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high


@triton.jit
@no_type_check
def _exact_dot(a, b, total):
    """``total + a @ b``, each product exact where a factor is a half and else as float32 has it; never TF32."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        total = tl.dot(a, b, total)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        low, middle, high = _halves(a)
        total = tl.dot(low, b, total)
        total = tl.dot(middle, b, total)
        total = tl.dot(high, b, total)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        low, middle, high = _halves(b)
        total = tl.dot(a, low, total)
        total = tl.dot(a, middle, total)
        total = tl.dot(a, high, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return total


@triton.jit
@no_type_check
def _load(base, rows, columns, row_stride, column_stride, NUM_ROWS, NUM_COLUMNS):
    """The tile ``base[rows, columns]``, zero outside."""
    offset = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(base + offset, mask=(rows < NUM_ROWS)[:, None] & (columns < NUM_COLUMNS)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
@no_type_check
def _rows_kernel(
    a,
    b,
    out,
    num_rows,
    NUM_INNER: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    B_INNER_STRIDE: tl.constexpr,
    B_COLUMN_STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``out = a @ b`` of contiguous ``a (num_rows, inner)`` and ``out (num_rows, columns)``."""
    tiles: tl.constexpr = (NUM_COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = tl.program_id(0) // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, NUM_INNER, BLOCK_INNER):
        inner = first + tl.arange(0, BLOCK_INNER)
        left = _load(a, row, inner, NUM_INNER, 1, num_rows, NUM_INNER)
        right = _load(b, inner, column, B_INNER_STRIDE, B_COLUMN_STRIDE, NUM_INNER, NUM_COLUMNS)
        total = _exact_dot(left, right, total)
    offset = row.to(tl.int64)[:, None] * NUM_COLUMNS + column[None, :]
    inside = (row < num_rows)[:, None] & (column < NUM_COLUMNS)[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split"])
@no_type_check
def _weight_grad_kernel(
    grad,
    x,
    partial_sums,
    num_tokens,
    tokens_per_split,
    NUM_EXPERTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """``partial_sums[split] = grad[range].T @ x[range]``, ``(splits, experts, dim)`` float32."""
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    split = tl.program_id(2)
    end = tl.minimum((split + 1) * tokens_per_split, num_tokens)
    total = tl.zeros((BLOCK_EXPERTS, BLOCK_DIM), tl.float32)
    for first in range(split * tokens_per_split, end, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        left = _load(grad, expert, token, 1, NUM_EXPERTS, NUM_EXPERTS, end)
        right = _load(x, token, column, DIM, 1, end, DIM)
        total = _exact_dot(left, right, total)
    offset = (split * NUM_EXPERTS + expert).to(tl.int64)[:, None] * DIM + column[None, :]
    inside = (expert < NUM_EXPERTS)[:, None] & (column < DIM)[None, :]
    tl.store(partial_sums + offset, total, mask=inside)


def _block(size: int, most: int) -> int:
    """A tile's length along a dimension: tensor cores take 16 at least."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _tile(left: torch.dtype, right: torch.dtype) -> tuple[int, int, int]:
    """Rows, inner dimension and columns of a tile: what the factors' dtypes leave registers for."""
    if torch.float32 not in (left, right):
        return 64, 64, 128
    # Three products of tensor cores, or scalar ones of float32.
    return (64, 32, 128) if torch.bfloat16 in (left, right) else (32, 32, 64)


def _multiply_rows(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``: ``a (rows, inner)`` contiguous, ``b (inner, columns)`` in any strides."""
    num_rows, num_inner = a.shape
    num_columns = b.shape[1]
    out = a.new_empty(num_rows, num_columns, dtype=dtype)
    if out.numel() == 0:
        return out
    block_rows, most_inner, most_columns = _tile(a.dtype, b.dtype)
    block_columns = _block(num_columns, most_columns)
    grid = (triton.cdiv(num_rows, block_rows) * triton.cdiv(num_columns, block_columns),)
    wrap_triton(_rows_kernel)[grid](
        a,
        b,
        out,
        num_rows,
        NUM_INNER=num_inner,
        NUM_COLUMNS=num_columns,
        B_INNER_STRIDE=b.stride(0),
        B_COLUMN_STRIDE=b.stride(1),
        BLOCK_ROWS=block_rows,
        BLOCK_INNER=_block(num_inner, most_inner),
        BLOCK_COLUMNS=block_columns,
    )
    return out


def router_logits(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    """``x @ weight.T`` of contiguous tensors; see :func:`moe.kernels.route.logits.router_logits`.

    Args:
        x: ``(T, D)``.
        weight: ``(E, D)``.
        batch_invariant: nothing to do, see above.

    Returns:
        ``(T, E)`` float32.
    """
    require_supported_gpu()
    return _multiply_rows(x, weight.t(), torch.float32)


def router_logits_input_grad(grad: Tensor, weight: Tensor, dtype: torch.dtype, batch_invariant: bool) -> Tensor:
    """The gradient of ``x``, ``grad @ weight``, of contiguous tensors.

    Args:
        grad: ``(T, E)`` float32.
        weight: ``(E, D)``.
        dtype: of ``x``.
        batch_invariant: nothing to do, see above.

    Returns:
        ``(T, D)`` in ``dtype``.
    """
    return _multiply_rows(grad, weight, dtype)


def router_logits_weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of ``weight``, ``grad.T @ x``, of contiguous tensors.

    Args:
        grad: ``(T, E)`` float32.
        x: ``(T, D)``.
        dtype: of ``weight``.

    Returns:
        ``(E, D)`` in ``dtype``.
    """
    num_tokens, num_experts = grad.shape
    dim = x.shape[1]
    if num_tokens == 0:
        return x.new_zeros(num_experts, dim, dtype=dtype)
    most_experts, block_tokens, most_dim = _tile(grad.dtype, x.dtype)
    # sym_min and not min, so that a compiled layer is not compiled again where one of the two becomes the smaller.
    ranges = torch.sym_min(MAX_SPLITS, triton.cdiv(num_tokens, SPLIT_TOKENS))
    tokens_per_split = triton.cdiv(triton.cdiv(num_tokens, ranges), block_tokens) * block_tokens
    partial_sums = grad.new_empty(ranges, num_experts, dim)
    block_experts, block_dim = _block(num_experts, most_experts), _block(dim, most_dim)
    grid = (triton.cdiv(num_experts, block_experts), triton.cdiv(dim, block_dim), ranges)
    wrap_triton(_weight_grad_kernel)[grid](
        grad,
        x,
        partial_sums,
        num_tokens,
        tokens_per_split,
        NUM_EXPERTS=num_experts,
        DIM=dim,
        BLOCK_EXPERTS=block_experts,
        BLOCK_TOKENS=block_tokens,
        BLOCK_DIM=block_dim,
    )
    return partial_sums.sum(0).to(dtype)
