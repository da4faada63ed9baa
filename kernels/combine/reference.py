"""Combining rows in PyTorch: the definition, and the path of the CPU."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_TOKENS = 64  # half-precision tokens, and
CHUNK_ROWS = 256  # rows, that are held in float32 at once: few enough to stay in a core's cache


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of values of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _sum_bags(rows: Tensor, weights: Tensor | None, source: Tensor, offsets: Tensor) -> Tensor:
    """Sum ``weights[i] * rows[source[i]]`` over ``offsets[t] <= i < offsets[t + 1]`` for each t, in ascending order."""
    return embedding_bag(source, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _accumulate(rows: Tensor, weights: Tensor | None, row_ids: Tensor) -> Tensor:
    tokens = row_ids.shape[0]
    is_owned = row_ids >= 0
    source = row_ids[is_owned]  # by token, then by choice
    offsets = row_ids.new_zeros(tokens + 1)
    torch.cumsum(is_owned.sum(1), dim=0, out=offsets[1:])
    if weights is not None:
        weights = weights[is_owned]
    dtype = accumulation_dtype(rows.dtype)
    if rows.dtype == dtype:
        return _sum_bags(rows, weights, source, offsets)
    # Half-precision rows would need weights of their dtype, hence float32 copies of a few rows at a time.
    out = rows.new_empty(tokens, rows.shape[1])
    for first in range(0, tokens, CHUNK_TOKENS):
        last = min(first + CHUNK_TOKENS, tokens)
        part = slice(int(offsets[first]), int(offsets[last]))
        copies = rows.index_select(0, source[part]).to(dtype)
        order = torch.arange(copies.shape[0], dtype=torch.int32)
        bags = offsets[first : last + 1] - offsets[first]
        out[first:last] = _sum_bags(copies, None if weights is None else weights[part], order, bags)
    return out


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
    num_owned = int(expert_offsets[-1])
    assigned = assignments[:num_owned].long()
    token = assigned // weights.shape[1]
    row_weights = weights.view(-1)[assigned]
    dots = torch.empty_like(row_weights)
    grad_rows = torch.empty_like(rows)
    grad_rows[num_owned:].zero_()
    for first in range(0, num_owned, CHUNK_ROWS):
        part = slice(first, min(first + CHUNK_ROWS, num_owned))
        dy = grad.index_select(0, token[part]).to(weights.dtype)
        torch.linalg.vecdot(dy, rows[part].to(weights.dtype), out=dots[part])
        torch.mul(dy, row_weights[part, None], out=grad_rows[part])
    grad_weights = torch.zeros_like(weights).view(-1).scatter_(0, assigned, dots)
    return grad_rows, grad_weights.view_as(weights)
