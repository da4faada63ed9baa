"""The router's logits in PyTorch: the definition, and the path of the CPU."""

import torch
from torch import Tensor

from moe.kernels.invariant import multiply_invariant

CHUNK_TOKENS = 512  # half-precision rows that are held in float32 at once


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logits of tokens of ``dtype``: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# Products write into given outputs, which autocast leaves alone.


def _chunk(tokens: int, dtype: torch.dtype, compute_dtype: torch.dtype) -> int:
    """How many tokens are converted at once: all where there is nothing to convert."""
    return max(1, tokens) if dtype == compute_dtype else CHUNK_TOKENS


def router_logits(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    """``x @ weight.T`` in float32; see :func:`moe.kernels.route.logits.router_logits`.

    Args:
        x: ``(T, D)``.
        weight: ``(E, D)``.
        batch_invariant: multiply in blocks of one shape.

    Returns:
        ``(T, E)`` float32, float64 for float64 tokens.
    """
    dtype = logits_dtype(x.dtype)
    weight = weight.to(dtype)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    if batch_invariant:
        return multiply_invariant(x, weight.t(), out)
    chunk = _chunk(x.shape[0], x.dtype, dtype)
    for rows, part in zip(x.split(chunk), out.split(chunk)):
        torch.mm(rows.to(dtype), weight.t(), out=part)
    return out


def router_logits_input_grad(grad: Tensor, weight: Tensor, dtype: torch.dtype, batch_invariant: bool) -> Tensor:
    """The gradient of ``x`` in :func:`router_logits`: ``grad @ weight``.

    Args:
        grad: ``(T, E)``.
        weight: ``(E, D)``.
        dtype: of ``x``.
        batch_invariant: multiply in blocks of one shape.

    Returns:
        ``(T, D)`` in ``dtype``.
    """
    weight = weight.to(grad.dtype)
    if batch_invariant:
        product = grad.new_empty(grad.shape[0], weight.shape[1])
        return multiply_invariant(grad, weight, product).to(dtype)
    out = grad.new_empty(grad.shape[0], weight.shape[1], dtype=dtype)
    chunk = _chunk(grad.shape[0], dtype, grad.dtype)
    for rows, part in zip(grad.split(chunk), out.split(chunk)):
        product = part if dtype == grad.dtype else torch.empty_like(part, dtype=grad.dtype)
        torch.mm(rows, weight, out=product)
        if product is not part:
            part.copy_(product)
    return out


def router_logits_weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of ``weight`` in :func:`router_logits`: ``grad.T @ x``, summed in float32.

    Args:
        grad: ``(T, E)``.
        x: ``(T, D)``.
        dtype: of ``weight``.

    Returns:
        ``(E, D)`` in ``dtype``.
    """
    total = grad.new_zeros(grad.shape[1], x.shape[1])
    chunk = _chunk(x.shape[0], x.dtype, grad.dtype)
    for part, rows in zip(grad.split(chunk), x.split(chunk)):
        torch.addmm(total, part.t(), rows.to(grad.dtype), out=total)
    return total.to(dtype)
