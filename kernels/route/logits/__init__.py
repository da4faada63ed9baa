"""The router's logits: tokens times the router's weight, as exact as float32 whatever the dtypes are.

Example, 2 tokens, D=2, E=3, all bfloat16 but the logits::

    x      = [[1., 2.], [.5, 0.]]
    weight = [[1., 0.], [0., 1.], [1., .00390625]]
    logits = [[1., 2., 1.0078125], [.5, 0., .5]]    # float32; in bfloat16 1.0078125 would be the last above 1
"""

import torch
from torch import Tensor
from torch.library import CustomOpDef

from moe.errors import DtypeError, ShapeError
from moe.kernels.backends import HAS_TRITON, backend_of, check_float, register
from moe.kernels.route.logits import reference

if HAS_TRITON:
    from moe.kernels.route.logits import triton_backend


def _fake(x: Tensor, weight: Tensor, _batch_invariant: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=reference.logits_dtype(x.dtype))


def _fake_input_grad(grad: Tensor, weight: Tensor, dtype: torch.dtype, _batch_invariant: bool) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1], dtype=dtype)


def _fake_weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[1], x.shape[1], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def] # noqa: ARG001
    ctx.save_for_backward(*inputs[:2])
    ctx.batch_invariant = inputs[2]


def _register_autograd(op: CustomOpDef, input_grad: CustomOpDef, weight_grad: CustomOpDef) -> None:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = input_grad(grad, weight, x.dtype, ctx.batch_invariant) if ctx.needs_input_grad[0] else None
        grad_weight = weight_grad(grad, x, weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None

    op.register_autograd(backward, setup_context=_setup_context)


_LOGITS = register(
    "router_logits", _fake, reference.router_logits, triton_backend.router_logits if HAS_TRITON else None
)
_INPUT_GRAD = register(
    "router_logits_input_grad",
    _fake_input_grad,
    reference.router_logits_input_grad,
    triton_backend.router_logits_input_grad if HAS_TRITON else None,
)
_WEIGHT_GRAD = register(
    "router_logits_weight_grad",
    _fake_weight_grad,
    reference.router_logits_weight_grad,
    triton_backend.router_logits_weight_grad if HAS_TRITON else None,
)
for _backend, _op in _LOGITS.items():
    _register_autograd(_op, _INPUT_GRAD[_backend], _WEIGHT_GRAD[_backend])


def router_logits(x: Tensor, weight: Tensor, *, batch_invariant: bool = False) -> Tensor:
    """Multiply tokens by the router's weight, ``x @ weight.T``, in float32 and outside any autocast.

    On a GPU neither TF32 nor a lower precision of matrix products ever applies; on a CPU the product is PyTorch's,
    which ``torch.set_float32_matmul_precision`` may lower. Products of two bfloat16 (or two float16) numbers are exact
    in float32, so on a GPU tensor cores multiply them as they are; a float32 number beside a bfloat16 one is the sum of
    three bfloat16 ones; other pairs are multiplied as float32. The gradients are as exact, and are rounded once, to the
    dtypes of ``x`` and ``weight``. Backward keeps ``x`` and ``weight`` as they came. On a GPU an infinite number makes
    the logit infinite where it is the float32 one beside bfloat16; as the bfloat16 one beside float32 it may make NaN.

    Args:
        x: ``(T, D)`` bfloat16, float16 or float32; on the CPU also float64.
        weight: ``(E, D)``, on the device of ``x``, of any such dtype.
        batch_invariant: a token's logits are the same bits whatever else is in the batch. On a GPU they always are;
            on the CPU this costs time (see the explanation of the router's precision).

    Returns:
        ``(T, E)`` float32; float64 for float64 tokens.

    Raises:
        ShapeError: ``x`` and ``weight`` are no matrices of one width.
        DtypeError: ``x`` or ``weight`` is not floating point, or on a GPU float64; or ``weight`` is float64 and ``x``
            is not.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ShapeError(f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, must be (T, D) and (E, D)")
    check_float("x", x)
    check_float("weight", weight)
    if weight.dtype == torch.float64 != x.dtype:
        raise DtypeError(f"weight has dtype torch.float64 and x {x.dtype}; float64 logits need float64 tokens")
    return _LOGITS[backend_of(x)](x.contiguous(), weight.contiguous(), batch_invariant)
