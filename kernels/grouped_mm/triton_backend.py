"""Grouped products on GPUs.

A tile of rows has one expert, so the number of tiles depends on the offsets, which the host does not know. The grid
has room for the most tiles there can be (at most one partly filled tile a group), and each program finds its tile by
counting tiles over the offsets. Rows of no expert are one more group, whose tiles are stored as zeros.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK_ROWS = 128
BLOCK_OUT = 128
BLOCK_IN = 128
NUM_WARPS = 8
NUM_STAGES = 3


def _depth(dtype: torch.dtype) -> int:
    """Elements of a tile along the summed dimension: three stages of both operands fit in 96 KiB.

    Products of float32 are not for tensor cores but unrolled into the program, which a deep tile would bloat.
    """
    return 16 if dtype == torch.float32 else 64


@triton.jit
@no_type_check
def _find_tile(tile, expert_offsets, num_rows, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """The group of a tile, its first row and the end of its group; an empty range past the last tile."""
    group = tl.arange(0, BLOCK_GROUPS)
    start = tl.load(expert_offsets + group, mask=group <= num_experts, other=num_rows)
    end = tl.load(expert_offsets + group + 1, mask=group < num_experts, other=num_rows)
    last_tile = tl.cumsum((end - start + BLOCK_ROWS - 1) // BLOCK_ROWS, axis=0)
    mine = tl.sum((last_tile <= tile).to(tl.int32), axis=0)
    tiles_before = tl.max(tl.where(group < mine, last_tile, 0), axis=0)
    first = tl.sum(tl.where(group == mine, start, 0), axis=0) + (tile - tiles_before) * BLOCK_ROWS
    return mine, first, tl.sum(tl.where(group == mine, end, 0), axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])  # they say nothing about alignment
@no_type_check
def _grouped_mm_kernel(
    rows,
    weight,
    expert_offsets,
    out,
    num_rows,
    num_experts,
    num_in,
    num_out,
    weight_stride_expert,
    weight_stride_out,
    weight_stride_in,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    tiles_across = tl.cdiv(num_out, BLOCK_OUT)
    # Neighbouring programs share a tile of rows and an expert, so that both are read from the L2 cache.
    tile = tl.program_id(0) // tiles_across
    expert, first, end = _find_tile(tile, expert_offsets, num_rows, num_experts, BLOCK_ROWS, BLOCK_GROUPS)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % tiles_across) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    depth = tl.arange(0, DEPTH)
    in_rows = (row < end)[:, None]
    in_out = (column < num_out)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    if expert < num_experts:
        a = rows + row.to(tl.int64)[:, None] * num_in + depth[None, :]
        b = weight + expert.to(tl.int64) * weight_stride_expert
        b += column.to(tl.int64)[None, :] * weight_stride_out + depth.to(tl.int64)[:, None] * weight_stride_in
        for done in range(0, num_in, DEPTH):
            left = num_in - done
            a_tile = tl.load(a, mask=in_rows & (depth < left)[None, :], other=0.0)
            b_tile = tl.load(b, mask=in_out & (depth < left)[:, None], other=0.0)
            total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
            a += DEPTH
            b += DEPTH * weight_stride_in
    target = out + row.to(tl.int64)[:, None] * num_out + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_rows & in_out)


@triton.jit
@no_type_check
def _weight_grad_kernel(
    grad,
    rows,
    expert_offsets,
    out,
    num_in,
    num_out,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of one expert's gradient: the sum over the expert's rows, in their order."""
    tiles_across = tl.cdiv(num_in, BLOCK_IN)
    tiles = tl.cdiv(num_out, BLOCK_OUT) * tiles_across
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    column_out = (tile // tiles_across) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column_in = (tile % tiles_across) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    in_out = (column_out < num_out)[:, None]
    in_in = (column_in < num_in)[None, :]
    depth = tl.arange(0, DEPTH)
    row = (start + depth).to(tl.int64)
    a = grad + row[None, :] * num_out + column_out[:, None]  # read as its transpose
    b = rows + row[:, None] * num_in + column_in[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for done in range(0, end - start, DEPTH):
        left = end - start - done
        a_tile = tl.load(a, mask=in_out & (depth < left)[None, :], other=0.0)
        b_tile = tl.load(b, mask=in_in & (depth < left)[:, None], other=0.0)
        total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
        a += DEPTH * num_out
        b += DEPTH * num_in
    target = out + (expert.to(tl.int64) * num_out + column_out)[:, None] * num_in + column_in[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_out & in_in)


def grouped_mm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix; see :func:`moe.kernels.grouped_mm.grouped_mm`.

    Args:
        rows: ``(N, I)``, contiguous.
        weight: ``(E, O, I)``, any strides.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        ``(N, O)``, dtype of ``rows``.
    """
    num_rows, num_in = rows.shape
    num_experts, num_out, _ = weight.shape
    out = rows.new_empty(num_rows, num_out)
    if out.numel() == 0:
        return out
    # N rows in at most that many non-empty groups: each group adds less than one tile to N / BLOCK_ROWS.
    most_tiles = num_rows // BLOCK_ROWS + min(num_experts + 1, num_rows)
    wrap_triton(_grouped_mm_kernel)[(most_tiles * triton.cdiv(num_out, BLOCK_OUT),)](
        rows,
        weight,
        expert_offsets,
        out,
        num_rows,
        num_experts,
        num_in,
        num_out,
        *weight.stride(),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_OUT=BLOCK_OUT,
        DEPTH=_depth(rows.dtype),
        BLOCK_GROUPS=triton.next_power_of_2(num_experts + 1),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out


def grouped_mm_weight_grad(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """The gradient of ``weight`` in :func:`grouped_mm`: ``grad[e's rows].T @ rows[e's rows]``.

    Args:
        grad: ``(N, O)``, contiguous.
        rows: ``(N, I)``, contiguous.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        ``(E, O, I)``, dtype of ``rows``; zero for an expert without rows.
    """
    num_experts, num_out, num_in = expert_offsets.shape[0] - 1, grad.shape[1], rows.shape[1]
    out = rows.new_empty(num_experts, num_out, num_in)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(num_out, BLOCK_OUT) * triton.cdiv(num_in, BLOCK_IN)
    wrap_triton(_weight_grad_kernel)[(num_experts * tiles,)](
        grad,
        rows,
        expert_offsets,
        out,
        num_in,
        num_out,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
        DEPTH=_depth(rows.dtype),
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return out
