"""Gathering rows in PyTorch: the definition, and the path of the CPU."""

from torch import Tensor


def gather_rows(x: Tensor, assignments: Tensor, rows: Tensor) -> Tensor:
    """Copy each assignment's token; see :func:`moe.kernels.gather.gather_rows`.

    Args:
        x: ``(T, D)``.
        assignments: ``(N,)`` int32.
        rows: ``(T, K)`` int32; the inverse, which backward needs.

    Returns:
        ``(N, D)``, dtype of ``x``.
    """
    return x.index_select(0, assignments // rows.shape[1])
