"""Gather: one copy of a token for each of its assignments, in the plan's order.

Example, ``expert_ids = [[0, 2], [1, 0], [3, -1]]``, so K=2 and ``assignments = [0, 3, 2, 1, 4, 5]``::

    x    = [a, b, c]               # 3 tokens
    rows = [a, b, b, a, c, c]      # x[assignments // K]; the last belongs to no expert
    dx   = [r0 + r3, r2 + r1, r4]  # from drows = [r0 .. r5]: a sum over each token's rows, without the last
"""

from torch import Tensor
from torch.library import CustomOpDef

from moe.errors import ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, check_float, register
from moe.kernels.combine import SUM_ROWS
from moe.kernels.gather import reference
from moe.types import Plan

if HAS_TRITON:
    from moe.kernels.gather import triton_backend


def _fake(x: Tensor, assignments: Tensor, _rows: Tensor) -> Tensor:
    return x.new_empty(assignments.shape[0], x.shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ARG001
    ctx.save_for_backward(inputs[2])


def _register_autograd(op: CustomOpDef, sum_rows: CustomOpDef) -> None:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (rows,) = ctx.saved_tensors
        return sum_rows(grad.contiguous(), rows), None, None

    op.register_autograd(backward, setup_context=_setup_context)


_GATHER_ROWS = register("gather_rows", _fake, reference.gather_rows, triton_backend.gather_rows if HAS_TRITON else None)
for _backend, _op in _GATHER_ROWS.items():
    _register_autograd(_op, SUM_ROWS[_backend])


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    """Copy each assignment's token into its row: ``rows[i] = x[assignments[i] // K]``.

    Rows of no expert are copies too; their gradient is not read. The gradient of a token is the sum over its rows,
    best expert first, accumulated in float32 (float64 for float64).

    Args:
        x: ``(T, D)`` floating point.
        plan: of T tokens, on the device of ``x``.

    Returns:
        ``(N, D)``, dtype of ``x``.

    Raises:
        ShapeError: ``x`` is not a matrix with the plan's number of rows.
        DtypeError: ``x`` is not floating point, or of a dtype that GPU kernels do not compute with.
    """
    if x.ndim != 2 or x.shape[0] != plan.rows.shape[0]:
        raise ShapeError(f"x has shape {tuple(x.shape)}, must be (tokens, dim) with tokens={plan.rows.shape[0]}")
    check_float("x", x)
    return _GATHER_ROWS[backend_of(x)](x.contiguous(), plan.assignments.contiguous(), plan.rows.contiguous())
