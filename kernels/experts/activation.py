"""The activation between an expert's two products, forward and backward, on the CPU.

Written over rows that are in the cache, into memory that is there: every step is one pass, and none allocates.
"""

import torch
from torch import Tensor

from moe.config import Activation

_ATEN = torch.ops.aten  # its functions take `out`, which those of torch.nn.functional do not


def activate(up: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Apply the activation.

    Args:
        up: ``(n, U)``; U = 2F for a gated activation, the gate's F columns first; else U = F.
        activation: which.
        out: ``(n, F)``; written, and returned.
    """
    match activation:
        case Activation.SWIGLU:
            gate, value = up.chunk(2, dim=-1)
            return _ATEN.silu.out(gate, out=out).mul_(value)
        case Activation.GELU:
            return _ATEN.gelu.out(up, out=out)
        case Activation.RELU:
            return torch.clamp(up, min=0, out=out)
        case Activation.RELU_SQUARED:
            return torch.clamp(up, min=0, out=out).square_()


def activate_backward(
    up: Tensor, grad: Tensor, weights: Tensor, activation: Activation, grad_up: Tensor, act: Tensor, dots: Tensor
) -> None:
    """The gradients around ``weights * activation(up)``, from one reading of ``up``.

    Args:
        up: ``(n, U)``, as in :func:`activate`.
        grad: ``(n, F)``; the gradient of the *weighted* activation. Overwritten.
        weights: ``(n, 1)``; each row's routing weight.
        activation: which.
        grad_up: ``(n, U)``; written: the gradient of ``up``.
        act: ``(n, F)``; written: the weighted activation, which the down projection's weight gradient needs.
        dots: ``(n,)``; written: the gradient of ``weights``.
    """
    if activation is Activation.SWIGLU:
        gate, value = up.chunk(2, dim=-1)
        grad_gate, grad_value = grad_up.chunk(2, dim=-1)
        silu = _ATEN.silu.out(gate, out=act)
        torch.mul(silu, grad, out=grad_value)
        torch.mul(grad_value, value, out=grad_gate)
        torch.sum(grad_gate, dim=1, out=dots)
        grad_value.mul_(weights)
        silu.mul_(value).mul_(weights)
        grad.mul_(value).mul_(weights)
        _ATEN.silu_backward.grad_input(grad, gate, grad_input=grad_gate)
        return
    activate(up, activation, out=act)
    torch.mul(act, grad, out=grad_up)
    torch.sum(grad_up, dim=1, out=dots)
    act.mul_(weights)
    grad.mul_(weights)
    match activation:
        case Activation.GELU:
            _ATEN.gelu_backward.grad_input(grad, up, grad_input=grad_up)
        case Activation.RELU:
            _ATEN.threshold_backward.grad_input(grad, up, 0, grad_input=grad_up)
        case Activation.RELU_SQUARED:
            torch.clamp(up, min=0, out=grad_up).mul_(2).mul_(grad)
