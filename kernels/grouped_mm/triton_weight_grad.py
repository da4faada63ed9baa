"""The kernel of a weight's gradient, a sum over an expert's rows, and the kernel of a bias's."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def weight_grad_kernel(
    left,
    left_tokens,
    right,
    expert_offsets,
    out,
    # Constants of a layer: with them known, addresses are folded into the instructions.
    num_left: tl.constexpr,
    num_right: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # whether out is (E, right, left)
    GATHER: tl.constexpr,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    STRIP: tl.constexpr,
):
    """``left[e's rows].T @ right[e's rows]``: a program does some tiles of one expert, each in the rows' order."""
    OFFSET: tl.constexpr = tl.int32 if num_left * num_right < 2**31 else tl.int64  # within one expert's matrix
    across: tl.constexpr = (num_right + BLOCK_RIGHT - 1) // BLOCK_RIGHT
    tiles: tl.constexpr = (num_left + BLOCK_LEFT - 1) // BLOCK_LEFT * across
    programs: tl.constexpr = (tiles + STRIP - 1) // STRIP
    expert = tl.program_id(0) // programs
    first_tile = tl.program_id(0) % programs * STRIP
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    if LEFT_TMA:  # what lies outside a descriptor's shape, as the next expert's rows do, is not read, and is zero
        left_blocks = tl.make_tensor_descriptor(
            left, [tl.maximum(end, 1), num_left], [num_left, 1], [DEPTH, BLOCK_LEFT]
        )
    if RIGHT_TMA:
        right_blocks = tl.make_tensor_descriptor(
            right, [tl.maximum(end, 1), num_right], [num_right, 1], [DEPTH, BLOCK_RIGHT]
        )
    for strip_tile in range(1 if STRIP == 1 else tl.minimum(STRIP, tiles - first_tile)):
        first_left = (first_tile + strip_tile) // across * BLOCK_LEFT
        first_right = (first_tile + strip_tile) % across * BLOCK_RIGHT
        column_left = first_left + tl.arange(0, BLOCK_LEFT)
        in_left = column_left < num_left
        column_right = first_right + tl.arange(0, BLOCK_RIGHT)
        in_right = column_right < num_right
        total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
        for first in range(start, end, DEPTH):
            row = first + tl.arange(0, DEPTH)
            inside = row < end
            if LEFT_TMA:
                left_tile = left_blocks.load([first, first_left]).T
            else:  # as its transpose: a tile turned round after loading is copied through registers on Ampere
                source = (tl.load(left_tokens + tl.minimum(row, end - 1)) if GATHER else row).to(tl.int64)
                pointers = left + (source[None, :] * num_left + column_left[:, None])
                left_tile = tl.load(pointers, mask=inside[None, :] & in_left[:, None], other=0.0)
            if RIGHT_TMA:
                right_tile = right_blocks.load([first, first_right])
            else:
                pointers = right + (row.to(tl.int64)[:, None] * num_right + column_right[None, :])
                right_tile = tl.load(pointers, mask=inside[:, None] & in_right[None, :], other=0.0)
            total = tl.dot(left_tile, right_tile, total, input_precision="ieee")
        base = out + expert.to(tl.int64) * (num_left * num_right)
        total = total.to(out.dtype.element_ty)
        if TRANSPOSED:
            target = base + (column_right.to(OFFSET)[:, None] * num_left + column_left[None, :])
            tl.store(target, tl.trans(total), mask=in_right[:, None] & in_left[None, :])
        else:
            target = base + (column_left.to(OFFSET)[:, None] * num_right + column_right[None, :])
            tl.store(target, total, mask=in_left[:, None] & in_right[None, :])


@triton.jit
@no_type_check
def grouped_sum_kernel(
    rows,
    tokens,
    row_weights,
    expert_offsets,
    out,
    dim,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """The sum of one expert's rows over one block of columns."""
    expert = tl.program_id(0)
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = column < dim
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = row < end
        source = tl.load(tokens + row, mask=inside, other=0) if GATHER else row
        offset = source.to(tl.int64)[:, None] * dim + column[None, :]
        values = tl.load(rows + offset, mask=inside[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(row_weights + row, mask=inside, other=0.0)[:, None]
        total += values
    target = out + expert.to(tl.int64) * dim + column
    tl.store(target, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=in_dim)
