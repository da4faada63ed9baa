"""The experts' operation on GPUs: grouped products that gather for themselves, and what stands between them.

No row of the down projection is kept for backward: the gradient of a routing weight is the product of the activation
with the gradient that comes back through the down projection, and both are at hand where the activation's own
gradient is made (Source: SonicMoE, arXiv 2512.14080).

Rows of no expert are never read; in intermediate results they hold anything.
"""

import torch
from torch import Tensor

from moe.kernels.combine.triton_backend import combine_rows, sum_rows
from moe.kernels.experts.triton_activation import activation_backward, activation_forward, can_overwrite
from moe.kernels.grouped_mm.triton_backend import grouped_mm, grouped_mm_weight_grad, grouped_sum


def experts_forward(
    x: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    row_ids: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep_up: bool,
    weight_grad_dtype: torch.dtype | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Run every token through its experts and sum by weight; see :func:`moe.kernels.experts.run_experts`.

    Args:
        x: ``(T, D)``, contiguous.
        weights: ``(T, K)`` float32, contiguous; one of no expert may hold anything.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.
        row_ids: ``(T, K)`` int32, -1 for none.
        up_weight: ``(E, U, D)``, contiguous.
        down_weight: ``(E, D, F)``, contiguous.
        up_bias: ``(E, U)`` contiguous, or None.
        down_bias: ``(E, D)`` contiguous, or None.
        activation: a value of :class:`moe.config.Activation`.
        keep_up: return the up projection as well, for backward.
        weight_grad_dtype: for backward.
        batch_invariant: no choice here: a row's result never depends on what else is in its batch.

    Returns:
        y ``(T, D)``, dtype of ``x``; the up projection before the activation ``(N, U)``, or ``(0, U)``.
    """
    tokens = assignments // weights.shape[1]
    up = grouped_mm(x, up_weight, expert_offsets, tokens=tokens, bias=up_bias)
    hidden = activation_forward(up, expert_offsets, activation)
    if not keep_up:
        up = up.new_empty(0, up.shape[1])  # frees the rows before the next product needs memory
    rows = grouped_mm(hidden, down_weight, expert_offsets, bias=down_bias)
    del hidden
    return combine_rows(rows, weights, row_ids, assignments, expert_offsets), up


def experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    row_ids: Tensor,
    up: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    needs: list[bool],
    weight_grad_dtype: torch.dtype | None,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`experts_forward`; a routing weight of no expert gets exactly zero.

    Args:
        grad: ``(T, D)``, dtype of ``x``, contiguous.
        x: ``(T, D)``, contiguous, and so the others.
        weights: ``(T, K)`` float32; one of no expert may hold anything.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.
        row_ids: ``(T, K)`` int32, -1 for none.
        up: ``(N, U)`` as returned there, or ``(0, U)``: then it is computed again.
        up_weight: ``(E, U, D)``.
        down_weight: ``(E, D, F)``.
        up_bias: ``(E, U)``, or None.
        down_bias: ``(E, D)``, or None.
        activation: a value of :class:`moe.config.Activation`.
        needs: whether the gradient of x, weights, up_weight, down_weight, up_bias, down_bias is wanted.
        weight_grad_dtype: of the last four gradients; None for the dtype of ``x``. Sums are float32 in any case.
        batch_invariant: no choice here either.

    Returns:
        The six gradients in the order of ``needs``; ``(0,)`` for one that is not wanted or has no bias.
    """
    need_x, need_weights, need_up_weight, need_down_weight, need_up_bias, need_down_bias = needs
    tokens = assignments // weights.shape[1]
    grad_up, weighted, grad_weights = _through_activation(
        grad, x, weights, assignments, expert_offsets, tokens, up, up_weight, down_weight, up_bias,
        down_bias if need_weights else None, activation,
    )  # fmt: skip
    grad_x, grad_up_weight, grad_down_weight, grad_up_bias, grad_down_bias = (x.new_empty(0) for _ in range(5))
    if need_down_weight:
        grad_down_weight = grouped_mm_weight_grad(
            grad, weighted, expert_offsets, grad_tokens=tokens, out_dtype=weight_grad_dtype
        )
    del weighted
    if need_x:
        grad_x = sum_rows(grouped_mm(grad_up, up_weight.transpose(1, 2), expert_offsets), row_ids)
    if need_up_weight:
        grad_up_weight = grouped_mm_weight_grad(
            grad_up, x, expert_offsets, row_tokens=tokens, out_dtype=weight_grad_dtype
        )
    if need_up_bias and up_bias is not None:
        grad_up_bias = grouped_sum(grad_up, expert_offsets, out_dtype=weight_grad_dtype)
    if need_down_bias and down_bias is not None:
        row_weights = weights.view(-1).index_select(0, assignments)
        grad_down_bias = grouped_sum(
            grad, expert_offsets, tokens=tokens, row_weights=row_weights, out_dtype=weight_grad_dtype
        )
    grad_weights = grad_weights if need_weights else weights.new_empty(0)
    return grad_x, grad_weights, grad_up_weight, grad_down_weight, grad_up_bias, grad_down_bias


def _through_activation(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    tokens: Tensor,
    up: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the up projection ``(N, U)``, the weighted activation ``(N, F)``, the gradient of ``weights``."""
    grad_hidden = grouped_mm(grad, down_weight.transpose(1, 2), expert_offsets, tokens=tokens)
    in_place = can_overwrite(grad_hidden.shape[1], activation)
    weighted = grad_hidden if in_place else torch.empty_like(grad_hidden)
    if up.shape[0] == tokens.shape[0]:  # kept by autograd, which another backward may read
        grad_up = torch.empty_like(up)
    else:
        up = grouped_mm(x, up_weight, expert_offsets, tokens=tokens, bias=up_bias)
        grad_up = up if in_place else torch.empty_like(up)
    grad_weights = activation_backward(
        up, grad_hidden, weights, assignments, expert_offsets, grad, down_bias, grad_up, weighted, activation
    )
    return grad_up, weighted, grad_weights
