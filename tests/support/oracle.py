"""The layer said differently: every token through every expert, then a mask. Slow, short, and float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

import moe
from moe.types import Routing

ACTIVATIONS = ("swiglu", "gelu", "relu", "relu_squared")


def activate(up: Tensor, activation: str) -> Tensor:
    """The activations, written from their formulas rather than taken from the library."""
    if activation == "swiglu":
        half = up.shape[-1] // 2
        gate, value = up[..., :half], up[..., half:]
        return gate / (1 + torch.exp(-gate)) * value
    if activation == "gelu":
        return up * 0.5 * (1 + torch.erf(up / 2**0.5))
    positive = up * (up > 0)
    return positive if activation == "relu" else positive**2


def feed_forward(
    x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str
) -> Tensor:
    hidden = activate(F.linear(x, up, up_bias), activation)
    return F.linear(hidden, down, down_bias)


def experts_oracle(experts: moe.experts.GroupedExperts, x: Tensor, routing: Routing) -> Tensor:
    """Sum over all experts of (the weight a token gives it, or 0) * expert(token)."""
    y = torch.zeros_like(x)
    for e in range(experts.up_weight.shape[0]):
        weight = (routing.weights * (routing.expert_ids == e)).sum(1, keepdim=True)
        up_bias = None if experts.up_bias is None else experts.up_bias[e]
        down_bias = None if experts.down_bias is None else experts.down_bias[e]
        out = feed_forward(
            x, experts.up_weight[e], experts.down_weight[e], up_bias, down_bias, experts.activation.value
        )
        y = y + weight.to(x.dtype) * out
    return y
