"""Products on the CPU whose rows do not depend on each other, to the last bit."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_ROWS = 32
"""Enough to read a matrix once for many rows, few enough to waste little on filling up."""

WIDTH_MULTIPLE = 16


def multiply_invariant(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """``out = rows @ matrix``, such that a row's product depends on neither the other rows nor its place among them.

    The library underneath sums in another order for another number of rows. So every product here has the same shape
    and the same place in memory: 32 rows, filled up with zeros. Both widths are filled up as well, to a multiple of 16:
    for others MKL's order depends on the row's place in the block.

    Args:
        rows: ``(n, I)``, any dtype.
        matrix: ``(I, O)``, dtype of ``out``.
        out: ``(n, O)``; written, and returned.
    """
    wide_in, wide_out = (-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE for width in matrix.shape)
    if matrix.shape != (wide_in, wide_out):
        matrix = pad(matrix, (0, wide_out - matrix.shape[1], 0, wide_in - matrix.shape[0]))
    block, product = out.new_zeros(BLOCK_ROWS, wide_in), out.new_empty(BLOCK_ROWS, wide_out)
    for part, part_out in zip(rows.split(BLOCK_ROWS), out.split(BLOCK_ROWS)):
        size = part.shape[0]
        block[:size, : rows.shape[1]] = part
        block[size:] = 0
        part_out.copy_(torch.mm(block, matrix, out=product)[:size, : out.shape[1]])
    return out
