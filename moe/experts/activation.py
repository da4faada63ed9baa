"""What stands between the two products of an expert."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moe.config import Activation


def activate(up: Float[Tensor, "*rows U"], activation: Activation) -> Float[Tensor, "*rows F"]:
    """Apply an activation to the output of the up projection.

    Args:
        up: U = 2F for a gated activation, the gate's F columns first; else U = F.
        activation: which.
    """
    match activation:
        case Activation.SWIGLU:
            gate, value = up.chunk(2, dim=-1)
            return F.silu(gate) * value
        case Activation.GELU:
            return F.gelu(up)
        case Activation.RELU:
            return F.relu(up)
        case Activation.RELU_SQUARED:
            return F.relu(up).square()
