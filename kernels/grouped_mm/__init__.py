"""Grouped products: each expert's rows times the expert's matrix.

Example, E=2 experts from I=8 to O=5 features, 4 rows, ``expert_offsets = [0, 3, 3]``::

    rows (4, 8), weight (2, 5, 8) -> out (4, 5)
    out[0:3] = rows[0:3] @ weight[0].T    # expert 0 owns three rows
                                          # expert 1 owns none: its weight gets a gradient of zero
    out[3]   = 0                          # no expert's row: not read, its gradient is zero
"""

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe.errors import DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, check_float, register
from moe.kernels.grouped_mm import reference

if HAS_TRITON:
    from moe.kernels.grouped_mm import triton_backend


def _fake(rows: Tensor, weight: Tensor, _expert_offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def _fake_weight_grad(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty(expert_offsets.shape[0] - 1, grad.shape[1], rows.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _register_autograd(op: CustomOpDef, weight_grad: CustomOpDef) -> None:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows, weight, expert_offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows = op(grad, weight.transpose(1, 2), expert_offsets) if ctx.needs_input_grad[0] else None
        grad_weight = weight_grad(grad, rows, expert_offsets) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None

    op.register_autograd(backward, setup_context=_setup_context)


_GROUPED_MM = register("grouped_mm", _fake, reference.grouped_mm, triton_backend.grouped_mm_op if HAS_TRITON else None)
_GROUPED_MM_WEIGHT_GRAD = register(
    "grouped_mm_weight_grad",
    _fake_weight_grad,
    reference.grouped_mm_weight_grad,
    triton_backend.grouped_mm_weight_grad_op if HAS_TRITON else None,
)
for _backend, _op in _GROUPED_MM.items():
    _register_autograd(_op, _GROUPED_MM_WEIGHT_GRAD[_backend])


def grouped_mm(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """Multiply each expert's rows by the expert's matrix, ``out[i] = weight[e] @ rows[i]`` for the rows i of e.

    Rows from ``expert_offsets[E]`` on belong to no expert: they are not read, and give exactly zero. Products are
    accumulated in float32 (float64 for float64); on a GPU float32 is multiplied as float32, not as TF32.

    Args:
        rows: ``(N, I)`` floating point, sorted by expert.
        weight: ``(E, O, I)``, dtype of ``rows``.
        expert_offsets: ``(E + 1,)`` int32, on the device of ``rows``, ascending from 0 to at most N; expert e owns rows
            ``expert_offsets[e] .. expert_offsets[e + 1]``. Checked on the CPU; on a GPU its values are not read back.

    Returns:
        ``(N, O)``, dtype of ``rows``.

    Raises:
        ShapeError: the shapes do not fit together, there is no expert, or on the CPU ``expert_offsets`` does not ascend
            from 0 to at most N.
        DtypeError: ``rows`` and ``weight`` differ, the kernels of their device do not compute with their dtype, or
            ``expert_offsets`` is not int32.
    """
    if rows.ndim != 2 or weight.ndim != 3 or rows.shape[1] != weight.shape[2]:
        raise ShapeError(
            f"rows has shape {tuple(rows.shape)} and weight {tuple(weight.shape)}, must be (N, I) and (E, O, I)"
        )
    if weight.shape[0] == 0:
        raise ShapeError(f"weight has 0 experts, shape {tuple(weight.shape)}, must have at least 1")
    if expert_offsets.shape != (weight.shape[0] + 1,):
        raise ShapeError(f"expert_offsets has shape {tuple(expert_offsets.shape)}, must be ({weight.shape[0] + 1},)")
    check_float("rows", rows)
    if weight.dtype != rows.dtype:
        raise DtypeError(f"weight has dtype {weight.dtype}, must be {rows.dtype} as rows")
    if expert_offsets.dtype != torch.int32:
        raise DtypeError(f"expert_offsets has dtype {expert_offsets.dtype}, must be int32")
    operands = (each.contiguous() for each in (rows, weight, expert_offsets))
    return _GROUPED_MM[backend_of(rows)](*operands)
