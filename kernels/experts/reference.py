"""The experts' operation in PyTorch: the definition, and the path of the CPU.

The routing weight multiplies the activation, so that a token's output is the plain sum of its rows: they are added to
it block by block, by rising expert, and never all in memory. Backward follows
SonicMoE (arXiv 2512.14080): with ``grad[token] @ W_down``, the gradient of a row's weighted activation, that of its
weight is the dot product with the activation. So no output of the down projection is kept, and the activation is made
again from ``up``.
"""

import torch
from torch import Tensor

from moe.config import Activation
from moe.kernels.experts.activation import activate, activate_backward
from moe.kernels.experts.rows import Block, Rows


def experts_forward(
    x: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    row_ids: Tensor,  # noqa: ARG001
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep_up: bool,
    weight_grad_dtype: torch.dtype | None,  # noqa: ARG001
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """Run every token through its experts and sum by weight; see :func:`moe.kernels.experts.run_experts`.

    Args:
        x: ``(T, D)``, contiguous.
        weights: ``(T, K)``, contiguous; float32, or float64 where x is.
        assignments: ``(N,)`` int32.
        expert_offsets: ``(E + 1,)`` int32.
        row_ids: ``(T, K)`` int32, -1 for none.
        up_weight: ``(E, U, D)``.
        down_weight: ``(E, D, F)``.
        up_bias: ``(E, U)``, or None.
        down_bias: ``(E, D)``, or None.
        activation: a value of :class:`moe.config.Activation`.
        keep_up: return the up projection as well, for backward.
        weight_grad_dtype: for backward.
        batch_invariant: let a token's result depend on nothing else in its batch.

    Returns:
        y ``(T, D)``, dtype of ``x``; the up projection before the activation ``(N, U)``, or ``(0, U)``.

    Raises:
        ShapeError: ``expert_offsets`` does not ascend from 0 to at most N.
    """
    rows = Rows(x, weights, assignments, expert_offsets, batch_invariant=batch_invariant)
    up = torch.empty(assignments.shape[0] if keep_up else 0, up_weight.shape[1], dtype=x.dtype)
    y = torch.zeros(x.shape, dtype=rows.exact)
    for block in rows.blocks:
        block_up = rows.up(x, up_weight, up_bias, block, up[block.rows] if keep_up else None)
        act = rows.scratch("act", block, down_weight.shape[2], rows.exact)
        activate(rows.exact_up(block, block_up), Activation(activation), act)
        act.mul_(rows.weights[block.rows])
        act = rows.to(rows.products.dtype, "act", block, act)
        out = rows.multiply("down", act, down_weight.transpose(1, 2), block)
        if down_bias is not None:
            for (expert, part), weight in zip(block.by_expert(out), rows.weights[block.rows].split(block.sizes)):
                part += weight * down_bias[expert]
        rows.add_to_tokens("down", out, y, block)
    return y.to(x.dtype), up


def experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    assignments: Tensor,
    expert_offsets: Tensor,
    row_ids: Tensor,  # noqa: ARG001
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
        x: as in forward, and so the others.
        weights: ``(T, K)``.
        assignments: ``(N,)``.
        expert_offsets: ``(E + 1,)``.
        row_ids: ``(T, K)``.
        up: ``(N, U)`` as returned there, or ``(0, U)``: then it is computed again.
        up_weight: ``(E, U, D)``.
        down_weight: ``(E, D, F)``.
        up_bias: ``(E, U)``, or None.
        down_bias: ``(E, D)``, or None.
        activation: a value of :class:`moe.config.Activation`.
        needs: whether the gradient of x, weights, up_weight, down_weight, up_bias, down_bias is wanted.
        weight_grad_dtype: of the last four gradients; None for the dtype of ``x``. Sums are float32 in any case.
        batch_invariant: as in forward.

    Returns:
        The six gradients in the order of ``needs``; ``(0,)`` for one that is not wanted or has no bias.
    """
    rows = Rows(x, weights, assignments, expert_offsets, batch_invariant=batch_invariant)
    grads = _empty_grads((up_weight, down_weight, up_bias, down_bias), needs[2:], weight_grad_dtype or x.dtype)
    grad_up_weight, grad_down_weight, grad_up_bias, grad_down_bias = grads
    grad_x = torch.zeros(x.shape if needs[0] else 0, dtype=rows.exact)
    dots = torch.empty(rows.assignments.shape[0], dtype=rows.exact)
    is_kept = up.shape[0] == assignments.shape[0]
    for block in rows.blocks:
        block_up = up[block.rows] if is_kept else rows.up(x, up_weight, up_bias, block)
        grad_tokens = rows.gather("grad", grad, block)
        grad_act = rows.multiply("grad_act", grad_tokens, down_weight, block)
        act, grad_up = _through_activation(rows, block, block_up, grad_act, activation, dots[block.rows])
        if down_bias is not None and (needs[1] or needs[5]):
            _down_bias_backward(rows, block, grad_tokens, down_bias, dots[block.rows], grad_down_bias)
        if needs[3]:
            rows.weight_grad(grad_tokens, rows.to(rows.products.dtype, "act", block, act), block, grad_down_weight)
        if needs[4] and up_bias is not None:
            for expert, part in block.by_expert(grad_up):
                grad_up_bias[expert].copy_(part.sum(0))
        grad_up = rows.to(rows.products.dtype, "grad_up", block, grad_up)
        if needs[0]:
            rows.add_to_tokens("grad_x", rows.multiply("grad_x", grad_up, up_weight, block), grad_x, block)
        if needs[2]:
            rows.weight_grad(grad_up, rows.gather("x", x, block), block, grad_up_weight)
    grad_weights = _weights_grad(weights, assignments, dots) if needs[1] else weights.new_empty(0)
    return grad_x.to(x.dtype), grad_weights, grad_up_weight, grad_down_weight, grad_up_bias, grad_down_bias


def _empty_grads(parameters: tuple[Tensor | None, ...], needs: list[bool], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.empty(parameter.shape if needed and parameter is not None else 0, dtype=dtype)
        for parameter, needed in zip(parameters, needs)
    ]


def _through_activation(
    rows: Rows, block: Block, up: Tensor, grad_act: Tensor, activation: str, dots: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted activation and the gradient of ``up``, in scratch memory; writes the weights' gradient ``dots``."""
    act = rows.scratch("act", block, grad_act.shape[1], rows.exact)
    grad_up = rows.scratch("grad_up", block, up.shape[1], rows.exact)
    grad_act = rows.to(rows.exact, "grad_act", block, grad_act)
    weights = rows.weights[block.rows]
    activate_backward(rows.exact_up(block, up), grad_act, weights, Activation(activation), grad_up, act, dots)
    return act, grad_up


def _down_bias_backward(
    rows: Rows, block: Block, grad_tokens: Tensor, bias: Tensor, dots: Tensor, grad_bias: Tensor
) -> None:
    """Add the down bias' part to the weights' gradient, and write the bias' own gradient if it is wanted."""
    grad_tokens = rows.to(rows.exact, "grad", block, grad_tokens)
    parts = zip(block.by_expert(grad_tokens), rows.weights[block.rows].split(block.sizes), dots.split(block.sizes))
    for (expert, part), weight, dot in parts:
        dot += (part * bias[expert]).sum(1)
        if grad_bias.numel():
            grad_bias[expert].copy_((weight * part).sum(0))


def _weights_grad(weights: Tensor, assignments: Tensor, dots: Tensor) -> Tensor:
    """The rows' gradients in the place of their assignments; zero where there is no expert."""
    grad = torch.empty_like(weights).view(-1)
    grad[assignments[dots.shape[0] :]] = 0
    grad[assignments[: dots.shape[0]]] = dots
    return grad.view_as(weights)
