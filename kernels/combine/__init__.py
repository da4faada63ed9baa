"""Combine: a token's output is the weighted sum of its experts' rows.

Example, ``expert_ids = [[0, 2], [1, 0], [3, -1]]``, so ``plan.rows = [[0, 3], [2, 1], [4, -1]]``::

    rows    = [r0, r1, r2, r3, r4, r5]                    # r5 belongs to no expert and is not read
    weights = [[.7, .3], [.6, .4], [1., 0.]]
    y       = [.7 r0 + .3 r3, .6 r2 + .4 r1, 1. r4]
    drows   = [.7 dy0, .4 dy1, .6 dy1, .3 dy0, dy2, 0]
    dweights = [[dy0 . r0, dy0 . r3], [dy1 . r2, dy1 . r1], [dy2 . r4, 0]]
"""

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe.errors import DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, check_float, register
from moe.kernels.combine import reference
from moe.types import Plan

if HAS_TRITON:
    from moe.kernels.combine import triton_backend


def _fake_sum(rows: Tensor, row_ids: Tensor) -> Tensor:
    return rows.new_empty(row_ids.shape[0], rows.shape[1])


def _fake_combine(rows: Tensor, _weights: Tensor, row_ids: Tensor, _assignments: Tensor, _offsets: Tensor) -> Tensor:
    return _fake_sum(rows, row_ids)


def _fake_backward(
    _grad: Tensor, rows: Tensor, weights: Tensor, _assignments: Tensor, _offsets: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ARG001
    rows, weights, _, assignments, expert_offsets = inputs
    ctx.save_for_backward(rows, weights, assignments, expert_offsets)


def _register_autograd(op: CustomOpDef, combine_rows_backward: CustomOpDef) -> None:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_rows, grad_weights = combine_rows_backward(grad.contiguous(), *ctx.saved_tensors)
        return grad_rows, grad_weights, None, None, None

    op.register_autograd(backward, setup_context=_setup_context)


SUM_ROWS = register("sum_rows", _fake_sum, reference.sum_rows, triton_backend.sum_rows if HAS_TRITON else None)
"""``sum_rows(rows, row_ids)`` of each backend: a combine with weights of one, which is the gradient of a gather."""

_COMBINE_ROWS = register(
    "combine_rows", _fake_combine, reference.combine_rows, triton_backend.combine_rows if HAS_TRITON else None
)
_COMBINE_ROWS_BACKWARD = register(
    "combine_rows_backward",
    _fake_backward,
    reference.combine_rows_backward,
    triton_backend.combine_rows_backward if HAS_TRITON else None,
)
for _backend, _op in _COMBINE_ROWS.items():
    _register_autograd(_op, _COMBINE_ROWS_BACKWARD[_backend])


def combine_rows(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Sum each token's rows by weight: ``y[t] = sum_k weights[t, k] * rows[plan.rows[t, k]]``.

    The sum runs over k in ascending order and is kept in float32 (float64 for float64), so that it is the same on
    every run. Choices of no expert are skipped, and rows of no expert are not read: they may hold anything. Their
    gradients are exactly zero.

    Args:
        rows: ``(N, D)`` floating point, in the plan's order.
        weights: ``(T, K)`` float32; float64 where ``rows`` is.
        plan: of T tokens and N = T * K assignments, on the device of ``rows``.

    Returns:
        ``(T, D)``, dtype of ``rows``.

    Raises:
        ShapeError: ``rows`` or ``weights`` does not fit the plan.
        DtypeError: ``weights`` has another dtype than the sum, or the GPU kernels do not compute with that of ``rows``.
    """
    if rows.ndim != 2 or rows.shape[0] != plan.assignments.shape[0]:
        raise ShapeError(f"rows has shape {tuple(rows.shape)}, must be (rows, dim), rows={plan.assignments.shape[0]}")
    if weights.shape != plan.rows.shape:
        raise ShapeError(f"weights has shape {tuple(weights.shape)}, must be {tuple(plan.rows.shape)} as the plan's")
    check_float("rows", rows)
    expected = reference.accumulation_dtype(rows.dtype)
    if weights.dtype != expected:
        raise DtypeError(f"weights has dtype {weights.dtype}, must be {expected} for rows of {rows.dtype}")
    operands = (rows, weights, plan.rows, plan.assignments, plan.expert_offsets)
    return _COMBINE_ROWS[backend_of(rows)](*(each.contiguous() for each in operands))
