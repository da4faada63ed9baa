"""Combining rows in PyTorch: the definition, and the path of the CPU."""

import torch
from torch import Tensor

CHUNK = 1024  # rows whose products with the gradient are held at once, in float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of values of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _accumulate(rows: Tensor, weights: Tensor | None, row_ids: Tensor) -> Tensor:
    tokens, top_k = row_ids.shape
    total = rows.new_zeros(tokens, rows.shape[1], dtype=accumulation_dtype(rows.dtype))
    is_none = row_ids < 0
    any_none = bool(is_none.any())
    if any_none and weights is not None:
        weights = weights.masked_fill(is_none, 0)
    source = row_ids.clamp(min=0)
    for k in range(top_k):
        picked = rows.index_select(0, source[:, k])
        if any_none:  # replaced, not multiplied by zero: the row read in its place may hold NaN
            picked.masked_fill_(is_none[:, k, None], 0)
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked, weights[:, k, None])
    return total.to(rows.dtype)


def sum_rows(rows: Tensor, row_ids: Tensor) -> Tensor:
    """Sum each token's rows: :func:`combine_rows` with weights of one.

    Args:
        rows: ``(N, D)``.
        row_ids: ``(T, K)`` int32, -1 for none.

    Returns:
        ``(T, D)``, dtype of ``rows``.
    """
    return _accumulate(rows, None, row_ids)


def combine_rows(
    rows: Tensor,
    weights: Tensor,
    row_ids: Tensor,
    assignments: Tensor,  # noqa: ARG001
    expert_offsets: Tensor,  # noqa: ARG001
) -> Tensor:
    """Sum each token's rows by weight; see :func:`moe.kernels.combine.combine_rows`.

    Args:
        rows: ``(N, D)``.
        weights: ``(T, K)``.
        row_ids: ``(T, K)`` int32, -1 for none.
        assignments: ``(N,)`` int32; backward needs it.
        expert_offsets: ``(E + 1,)`` int32; backward needs it.

    Returns:
        ``(T, D)``, dtype of ``rows``.
    """
    return _accumulate(rows, weights, row_ids)


def combine_rows_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, assignments: Tensor, expert_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`combine_rows`; rows and weights of no expert get exactly zero.

    Args:
        grad: ``(T, D)``, dtype of ``rows``.
        rows: ``(N, D)``.
        weights: ``(T, K)``.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.

    Returns:
        The gradients of ``rows`` and of ``weights``, of their shapes and dtypes.
    """
    owned = int(expert_offsets[-1])
    assigned = assignments[:owned].long()
    grad_rows = torch.empty_like(rows)
    grad_rows[owned:].zero_()
    grad_owned = torch.index_select(grad, 0, assigned // weights.shape[1], out=grad_rows[:owned])
    dots = weights.new_empty(owned)
    for start in range(0, owned, CHUNK):
        part = slice(start, start + CHUNK)
        torch.sum(grad_owned[part].to(weights.dtype) * rows[:owned][part], dim=1, out=dots[part])
    grad_owned.mul_(weights.view(-1)[assigned, None])
    return grad_rows, torch.zeros_like(weights).view(-1).scatter_(0, assigned, dots).view_as(weights)
