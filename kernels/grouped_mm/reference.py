"""Grouped products in PyTorch: the definition, and the path of the CPU. One product an expert that has rows."""

from itertools import pairwise

import torch
from torch import Tensor

from moe.errors import ShapeError


def _rows_per_group(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """Turn offsets into the sizes of the experts' groups, and of the group of no expert behind them."""
    offsets = [*expert_offsets.tolist(), num_rows]
    sizes = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or min(sizes) < 0:
        raise ShapeError(f"expert_offsets={offsets[:-1]} must start at 0 and ascend to at most {num_rows}, the rows")
    return sizes


def grouped_mm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by its matrix; see :func:`moe.kernels.grouped_mm.grouped_mm`.

    Args:
        rows: ``(N, I)``.
        weight: ``(E, O, I)``, any strides.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        ``(N, O)``, dtype of ``rows``.

    Raises:
        ShapeError: ``expert_offsets`` does not ascend from 0 to at most N.
    """
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    sizes = _rows_per_group(expert_offsets, rows.shape[0])
    # split and unbind make all views in one call; a slice an expert would cost as much as a small product.
    *outs, unowned = out.split(sizes)
    for size, group, matrix, product in zip(sizes, rows.split(sizes), weight.unbind(), outs):
        if size:
            torch.mm(group, matrix.t(), out=product)
    unowned.zero_()
    return out


def grouped_mm_weight_grad(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """The gradient of ``weight`` in :func:`grouped_mm`: ``grad[e's rows].T @ rows[e's rows]``.

    Args:
        grad: ``(N, O)``.
        rows: ``(N, I)``.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        ``(E, O, I)``, dtype of ``rows``; zero for an expert without rows.
    """
    out = rows.new_empty(expert_offsets.shape[0] - 1, grad.shape[1], rows.shape[1])
    sizes = _rows_per_group(expert_offsets, rows.shape[0])
    for size, grad_group, group, product in zip(sizes, grad.split(sizes), rows.split(sizes), out.unbind()):
        if size:
            torch.mm(grad_group.t(), group, out=product)
        else:
            product.zero_()
    return out
