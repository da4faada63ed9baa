"""The kernel of the product: each expert's rows, gathered or not, times the expert's matrix.

A tile of rows has one expert, so the number of tiles depends on the offsets, which the host does not know: programs
that live as long as the launch take every n-th tile and count tiles over the offsets. Rows of no expert are a last
group, whose tiles are stored as zeros.
"""

from typing import no_type_check

import triton
import triton.language as tl

COLUMN_TILES = 8  # of one expert next to each other: with as many row tiles at work, both operands come from L2


@triton.jit
@no_type_check
def _count_tiles(expert_offsets, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """Tiles of rows up to and including each expert's."""
    expert = tl.arange(0, BLOCK_EXPERTS)
    start = tl.load(expert_offsets + expert, mask=expert < num_experts, other=0)
    end = tl.load(expert_offsets + expert + 1, mask=expert < num_experts, other=0)
    return tl.cumsum((end - start + BLOCK_ROWS - 1) // BLOCK_ROWS, axis=0)


@triton.jit
@no_type_check
def _find_tile(
    index,
    expert_offsets,
    num_rows,
    num_experts,
    tiles_across: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile's expert (``num_experts`` for no expert), its first row, the end of its group and its column.

    Example, offsets [0, 3, 3, 8] and 9 rows, BLOCK_ROWS=2, tiles_across=3, COLUMNS=2. Expert 0 has 2 tiles of rows, 1
    has none, 2 has 3 and no expert has 1, times 3 columns: ``last_tile = [6, 6, 15]``, 18 tiles. Index 9 has passed the
    first two: expert 2, local 3. A strip of two columns takes 3 * 2 tiles of it, so strip 0, within 3: the second tile
    of rows, the second column, hence ``(2, 3 + 2, 8, 1)``. Local 6 begins strip 1, one column wide: ``(2, 3, 8, 2)``.
    """
    last_tile = _count_tiles(expert_offsets, num_experts, BLOCK_ROWS, BLOCK_EXPERTS) * tiles_across
    is_expert = tl.arange(0, BLOCK_EXPERTS) < num_experts
    expert = tl.sum(((last_tile <= index) & is_expert).to(tl.int32), axis=0)
    local = index - tl.max(tl.where(last_tile <= index, last_tile, 0), axis=0)
    start = tl.load(expert_offsets + expert)
    end = tl.load(expert_offsets + expert + 1, mask=expert < num_experts, other=num_rows)
    strip = local // (tl.cdiv(end - start, BLOCK_ROWS) * COLUMNS)
    within = local - strip * (tl.cdiv(end - start, BLOCK_ROWS) * COLUMNS)
    width = tl.minimum(tiles_across - strip * COLUMNS, COLUMNS)
    return expert, start + (within // width) * BLOCK_ROWS, end, strip * COLUMNS + within % width


@triton.jit
@no_type_check
def _load(pointers, mask, WHOLE: tl.constexpr):
    """A tile; without a mask where it is whole, which saves registers."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
@no_type_check
def _store_tile(total, bias, out, expert, row, end, column, num_experts, num_out: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A finished tile, with the expert's bias if there is one, into the rows of its group."""
    if HAS_BIAS:
        added = tl.load(bias + expert * num_out + column, mask=(column < num_out) & (expert < num_experts), other=0)
        total += added.to(tl.float32)[None, :]
    target = out + (row.to(tl.int64)[:, None] * num_out + column[None, :])
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < num_out)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_experts"])  # they say nothing about alignment
@no_type_check
def grouped_mm_kernel(
    rows,
    tokens,
    weight,
    bias,
    expert_offsets,
    out,
    num_rows,
    num_experts,
    # Constants of a layer: with them known, addresses are folded into the instructions.
    num_in: tl.constexpr,
    num_out: tl.constexpr,
    stride_expert: tl.constexpr,
    stride_out: tl.constexpr,
    stride_in: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles_across: tl.constexpr = (num_out + BLOCK_OUT - 1) // BLOCK_OUT
    owned = tl.load(expert_offsets + num_experts)
    last_tile = _count_tiles(expert_offsets, num_experts, BLOCK_ROWS, BLOCK_EXPERTS)
    num_tiles = (tl.max(last_tile, axis=0) + tl.cdiv(num_rows - owned, BLOCK_ROWS)) * tiles_across
    if ROWS_TMA:  # what lies outside a descriptor's shape is not read, and is zero
        row_blocks = tl.make_tensor_descriptor(rows, [tl.maximum(owned, 1), num_in], [num_in, 1], [BLOCK_ROWS, DEPTH])
    if WEIGHT_TMA:
        # All experts' matrices below each other. A block that reaches into the next adds no column that is stored.
        matrix: tl.constexpr = stride_expert // (stride_out if stride_in == 1 else stride_in)
        if stride_in == 1:
            height = (num_experts - 1) * matrix + num_out
            weight_blocks = tl.make_tensor_descriptor(weight, [height, num_in], [stride_out, 1], [BLOCK_OUT, DEPTH])
        else:
            tl.static_assert(num_in % DEPTH == 0, "a block of the next expert's depth would be added")
            height = (num_experts - 1) * matrix + num_in
            weight_blocks = tl.make_tensor_descriptor(weight, [height, num_out], [stride_in, 1], [DEPTH, BLOCK_OUT])
    depth = tl.arange(0, DEPTH)
    for index in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        expert, first, end, across = _find_tile(
            index, expert_offsets, num_rows, num_experts, tiles_across, BLOCK_ROWS, BLOCK_EXPERTS, COLUMNS
        )
        row = first + tl.arange(0, BLOCK_ROWS)
        first_out = across * BLOCK_OUT
        column = first_out + tl.arange(0, BLOCK_OUT)
        in_out = (column < num_out)[None, :]
        # Past its group's end a tile repeats the last row, which needs no mask in the loop.
        source = tl.minimum(row, end - 1)
        if GATHER:
            source = tl.load(tokens + source)
        # 64 bits, but not in the loop: rows * num_in passes 2^31 long before memory runs out.
        a = rows + (source.to(tl.int64)[:, None] * num_in + depth[None, :])
        b = weight + expert.to(tl.int64) * stride_expert
        b += column.to(tl.int64)[None, :] * stride_out + depth.to(tl.int64)[:, None] * stride_in
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for done in range(0, tl.where(expert < num_experts, num_in, 0), DEPTH):
            in_depth = depth < num_in - done
            a_tile = row_blocks.load([first, done]) if ROWS_TMA else _load(a, in_depth[None, :], num_in % DEPTH == 0)
            if WEIGHT_TMA:
                if stride_in == 1:
                    b_tile = weight_blocks.load([expert * matrix + first_out, done]).T
                else:
                    b_tile = weight_blocks.load([expert * matrix + done, first_out])
            else:
                b_tile = _load(b, in_out & in_depth[:, None], num_in % DEPTH == 0 and num_out % BLOCK_OUT == 0)
            total = tl.dot(a_tile, b_tile, total, input_precision="ieee")
            a += DEPTH
            b += DEPTH * stride_in
        _store_tile(total, bias, out, expert, row, end, column, num_experts, num_out, HAS_BIAS)
