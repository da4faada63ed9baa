"""Gathering rows on GPUs: each program copies a tile of rows."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

BLOCK_ROWS = 4
MAX_BLOCK_DIM = 1024


@triton.jit(do_not_specialize=["num_rows"])  # it changes from batch to batch: one compilation serves all
@no_type_check
def _gather_kernel(
    x, assignments, out, num_rows, dim, TOP_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = (row < num_rows)[:, None] & (column < dim)[None, :]
    token = tl.load(assignments + row, mask=row < num_rows, other=0) // TOP_K
    # 64 bits: rows * dim passes 2^31 long before memory runs out.
    values = tl.load(x + token.to(tl.int64)[:, None] * dim + column[None, :], mask=inside, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * dim + column[None, :], values, mask=inside)


def gather_rows(x: Tensor, assignments: Tensor, rows: Tensor) -> Tensor:
    """Copy each assignment's token; see :func:`moe.kernels.gather.gather_rows`.

    Args:
        x: ``(T, D)``, contiguous.
        assignments: ``(N,)`` int32.
        rows: ``(T, K)`` int32; the inverse, which backward needs.

    Returns:
        ``(N, D)``, dtype of ``x``.
    """
    num_rows, dim = assignments.shape[0], x.shape[1]
    out = x.new_empty(num_rows, dim)
    if out.numel() == 0:
        return out
    block_dim = min(triton.next_power_of_2(dim), MAX_BLOCK_DIM)
    grid = (triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(dim, block_dim))
    wrap_triton(_gather_kernel)[grid](
        x, assignments, out, num_rows, dim, TOP_K=rows.shape[1], BLOCK_ROWS=BLOCK_ROWS, BLOCK_DIM=block_dim
    )
    return out
