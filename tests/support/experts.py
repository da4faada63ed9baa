"""What the tests of the experts' operation share: one call's inputs, and its result in float64 by another way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.config import Activation
from tests.support.kernels import random_ids
from tests.support.oracle import activate

GRADIENTS = ("x", "weights", "up_weight", "down_weight", "up_bias", "down_bias")

# Of an error's norm, relative to the result's. Every result passes at most four roundings in a row (the projection or
# its gradient, the activation, a row, a token's sum), each of half a unit in the last place: 2^-9 in bfloat16, 2^-12
# in float16, and independent, so that their norms add up at most. In float32 and float64 the products' sums round.
TOLERANCE = {torch.float64: 2**-45, torch.float32: 2**-19, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True)
class Case:
    """One call's inputs on the CPU, the parameters in the dtype that it runs in."""

    ids: Tensor
    num_experts: int
    activation: Activation
    x: Tensor
    weights: Tensor
    up_weight: Tensor
    down_weight: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    grad: Tensor

    def oracle(self) -> tuple[Tensor, list[Tensor]]:
        """The output and its gradients in float64: every token through every expert; the weights are a mask."""
        leaves = [getattr(self, name) for name in GRADIENTS]
        leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
        x, weights, up_weight, down_weight, up_bias, down_bias = leaves
        owned = torch.where(self.ids >= 0, weights, 0.0)
        chosen = (self.ids[:, :, None] == torch.arange(self.num_experts)).double()
        up = torch.einsum("td,eud->etu", x, up_weight)
        hidden = activate(up if up_bias is None else up + up_bias[:, None], self.activation.value)
        rows = torch.einsum("etf,edf->etd", hidden, down_weight)
        rows = rows if down_bias is None else rows + down_bias[:, None]
        y = torch.einsum("tk,tke,etd->td", owned, chosen, rows)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return y.detach(), list(torch.autograd.grad(y, wanted, self.grad.double()))


def make_case(
    ids: Tensor,
    num_experts: int,
    *,
    dim: int = 33,
    hidden_dim: int = 24,
    activation: Activation = Activation.SWIGLU,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Random inputs of about unit size; the weights of choices that are no expert are NaN."""
    up_dim = hidden_dim * (2 if activation.is_gated else 1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    exact = torch.promote_types(dtype, torch.float32)
    return Case(
        ids=ids,
        num_experts=num_experts,
        activation=activation,
        x=normal(ids.shape[0], dim),
        weights=torch.rand(ids.shape, generator=generator, dtype=exact).masked_fill(ids < 0, float("nan")),
        up_weight=normal(num_experts, up_dim, dim, scale=dim**-0.5),
        down_weight=normal(num_experts, dim, hidden_dim, scale=hidden_dim**-0.5),
        up_bias=normal(num_experts, up_dim) if bias else None,
        down_bias=normal(num_experts, dim) if bias else None,
        grad=normal(ids.shape[0], dim),
    )


def ragged_case(**options: Any) -> Case:
    """37 tokens of 3 choices among 5 experts; expert 2 gets none, and some choices are no expert."""
    ids = random_ids(37, 3, 5)
    return make_case(ids.masked_fill(ids == 2, 0), 5, **options)


def assert_close(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare by the norm of the error, relative to that of the result."""
    assert value.shape == expected.shape, name
    error = (value.detach().cpu().double() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm(), f"{name} is off by {error / expected.norm():.1e} of its norm"
