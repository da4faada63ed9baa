"""Combining rows on GPUs: a token belongs to one program, which adds its rows in a fixed order; no atomics."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK_TOKENS = 4
MAX_BLOCK_DIM = 512


@triton.jit(do_not_specialize=["num_tokens", "top_k"])
@no_type_check
def _combine_kernel(
    rows,
    weights,
    row_ids,
    out,
    num_tokens,
    top_k,
    dim,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_tokens = token < num_tokens
    in_dim = column < dim
    choice = token.to(tl.int64) * top_k
    total = tl.zeros((BLOCK_TOKENS, BLOCK_DIM), tl.float32)
    for k in range(top_k):
        row = tl.load(row_ids + choice + k, mask=in_tokens, other=-1)
        owned = row >= 0
        offset = row.to(tl.int64)[:, None] * dim + column[None, :]
        values = tl.load(rows + offset, mask=owned[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            values *= tl.load(weights + choice + k, mask=owned, other=0.0)[:, None]
        total += values
    offset = token.to(tl.int64)[:, None] * dim + column[None, :]
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=in_tokens[:, None] & in_dim[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
@no_type_check
def _combine_backward_kernel(
    grad,
    rows,
    weights,
    assignments,
    expert_offsets,
    grad_rows,
    grad_weights,
    num_rows,
    num_experts,
    dim,
    TOP_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A row's gradient and its weight's: each element of both is written by one program, zeros included."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    owned = row < tl.load(expert_offsets + num_experts)
    assigned = tl.load(assignments + row, mask=inside, other=0)
    weight = tl.load(weights + assigned, mask=owned, other=0.0)
    row_start = row.to(tl.int64) * dim
    token_start = (assigned // TOP_K).to(tl.int64) * dim
    dots = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for first in range(0, dim, BLOCK_DIM):
        column = first + tl.arange(0, BLOCK_DIM)
        in_dim = (column < dim)[None, :]
        readable = owned[:, None] & in_dim
        dy = tl.load(grad + token_start[:, None] + column[None, :], mask=readable, other=0.0).to(tl.float32)
        values = tl.load(rows + row_start[:, None] + column[None, :], mask=readable, other=0.0).to(tl.float32)
        dots += dy * values
        # Not weight * dy for a row of no expert: 0 * 0 is right, but -0.0 and a NaN weight would not be.
        product = tl.where(owned[:, None], weight[:, None] * dy, 0.0).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + row_start[:, None] + column[None, :], product, mask=inside[:, None] & in_dim)
    tl.store(grad_weights + assigned, tl.sum(dots, axis=1), mask=inside)


def _launch_combine(rows: Tensor, weights: Tensor | None, row_ids: Tensor) -> Tensor:
    num_tokens, top_k = row_ids.shape
    dim = rows.shape[1]
    out = rows.new_empty(num_tokens, dim)
    if out.numel() == 0:
        return out
    block_dim = min(triton.next_power_of_2(dim), MAX_BLOCK_DIM)
    grid = (triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(dim, block_dim))
    wrap_triton(_combine_kernel)[grid](
        rows,
        rows if weights is None else weights,  # a pointer is needed, and not read without weights
        row_ids,
        out,
        num_tokens,
        top_k,
        dim,
        HAS_WEIGHTS=weights is not None,
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_DIM=block_dim,
    )
    return out


def sum_rows(rows: Tensor, row_ids: Tensor) -> Tensor:
    """Sum each token's rows: :func:`combine_rows` with weights of one.

    Args:
        rows: ``(N, D)``, contiguous.
        row_ids: ``(T, K)`` int32, -1 for none.

    Returns:
        ``(T, D)``, dtype of ``rows``.
    """
    return _launch_combine(rows, None, row_ids)


def combine_rows(rows: Tensor, weights: Tensor, row_ids: Tensor, assignments: Tensor, expert_offsets: Tensor) -> Tensor:
    """Sum each token's rows by weight; see :func:`moe.kernels.combine.combine_rows`.

    Args:
        rows: ``(N, D)``, contiguous.
        weights: ``(T, K)`` float32, contiguous.
        row_ids: ``(T, K)`` int32, -1 for none.
        assignments: ``(N,)`` int32; backward needs it.
        expert_offsets: ``(E + 1,)`` int32; backward needs it.

    Returns:
        ``(T, D)``, dtype of ``rows``.
    """
    return _launch_combine(rows, weights, row_ids)


def combine_rows_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, assignments: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`combine_rows`; rows and weights of no expert get exactly zero.

    Args:
        grad: ``(T, D)``, dtype of ``rows``, contiguous.
        rows: ``(N, D)``, contiguous.
        weights: ``(T, K)`` float32, contiguous.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        The gradients of ``rows`` and of ``weights``, of their shapes and dtypes.
    """
    num_rows, dim = rows.shape
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if num_rows == 0:
        return grad_rows, grad_weights
    block_dim = min(triton.next_power_of_2(max(dim, 1)), MAX_BLOCK_DIM)
    wrap_triton(_combine_backward_kernel)[(triton.cdiv(num_rows, BLOCK_TOKENS),)](
        grad,
        rows,
        weights,
        assignments,
        expert_offsets,
        grad_rows,
        grad_weights,
        num_rows,
        expert_offsets.shape[0] - 1,
        dim,
        TOP_K=weights.shape[1],
        BLOCK_ROWS=BLOCK_TOKENS,
        BLOCK_DIM=block_dim,
    )
    return grad_rows, grad_weights
