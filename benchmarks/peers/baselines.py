"""Without any library: the mixture in plain PyTorch, its products alone, and the dense floor."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peers.contestant import Contestant, Layer, Problem, gradient


@final
class PlainMoE(nn.Module):
    """A mixture of experts as one writes it down: a loop over experts, gather, two products, index_add."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.top_k = problem.case.top_k
        self.up = nn.Parameter(problem.up_weight)
        self.down = nn.Parameter(problem.down_weight)
        self.router = nn.Parameter(problem.router_weight)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids ``(T, K)``, decided in float32."""
        scores = F.linear(x.float(), self.router.float()).softmax(-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.top_k > 1 else weights), ids

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        weights, ids = self.route(x)
        weights = weights.to(x.dtype)
        y = torch.zeros_like(x)
        # unbind: the gradient of a stack is one stack, where indexing makes a zero-filled stack for every expert
        for expert, (up, down) in enumerate(zip(self.up.unbind(), self.down.unbind())):
            tokens, place = (ids == expert).nonzero(as_tuple=True)
            gate, value = F.linear(x[tokens], up).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * value, down)
            y.index_add_(0, tokens, out * weights[tokens, place, None])
        return y


def plain(problem: Problem) -> Contestant:
    """The mixture in plain PyTorch."""
    layer = PlainMoE(problem)
    return Layer(
        problem,
        layer,
        layer,
        lambda: {"up": gradient(layer.up), "down": gradient(layer.down), "router": gradient(layer.router)},
        lambda x: layer.route(x)[1],
    )


@final
class DenseSwiGLU(nn.Module):
    """A dense feed-forward block."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        """``(T, D)`` to ``(T, D)``."""
        gate, value = F.linear(x, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.down)


def dense(problem: Problem) -> Contestant:
    """The floor: all tokens through one block of width K * F, which is as much arithmetic as K experts of F."""
    E, D, width = problem.case.num_experts, problem.case.dim, problem.case.top_k * problem.case.hidden_dim
    # The first K experts' numbers; a copy each, since a product runs at its speed on a matrix of its own.
    up = problem.up_weight.reshape(-1, D)[: 2 * width].clone()
    down = problem.down_weight.transpose(0, 1).reshape(D, -1)[:, :width].clone()
    assert up.shape == (2 * width, D), f"K experts out of {E}"
    layer = DenseSwiGLU(up, down)
    return Layer(problem, layer, layer)


@final
class BareProducts(Contestant):
    """One ``torch.mm`` per expert into a buffer that exists: two products forward, four more backward, no more.

    What feeds the products is not computed but lies there, so that it has the right sizes but no meaning.
    """

    def __init__(self, problem: Problem) -> None:
        case = problem.case
        ids = PlainMoE(problem).route(problem.x)[1]
        self.counts = torch.bincount(ids.reshape(-1), minlength=case.num_experts).tolist()
        self.up_weight, self.down_weight = problem.up_weight, problem.down_weight
        self.rows = problem.x.repeat_interleave(case.top_k, 0)
        self.down_grad = problem.output_grad.repeat_interleave(case.top_k, 0)
        self.hidden = self.rows.new_full((case.rows, case.hidden_dim), 0.5)
        self.up_grad = self.rows.new_full((case.rows, 2 * case.hidden_dim), 0.5)
        self.up, self.down = torch.empty_like(self.up_grad), torch.empty_like(self.down_grad)
        self.hidden_grad, self.rows_grad = torch.empty_like(self.hidden), torch.empty_like(self.rows)
        self.up_weight_grad = torch.empty_like(self.up_weight)
        self.down_weight_grad = torch.empty_like(self.down_weight)

    def ready(self, training: bool) -> None:
        """Nothing is left: every buffer is overwritten."""

    def forward(self) -> Tensor:
        """The two products; rows in no meaningful order."""
        self._products(self.rows, self.up_weight.mT, self.up)
        self._products(self.hidden, self.down_weight.mT, self.down)
        return self.down

    @torch.no_grad()
    def step(self) -> Tensor:
        """All six products."""
        self.forward()
        self._products(self.down_grad, self.down_weight, self.hidden_grad)
        self._outer_products(self.down_grad, self.hidden, self.down_weight_grad)
        self._products(self.up_grad, self.up_weight, self.rows_grad)
        self._outer_products(self.up_grad, self.rows, self.up_weight_grad)
        return self.down

    def _products(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        for a, weight, b in zip(rows.split(self.counts), weights, out.split(self.counts)):
            torch.mm(a, weight, out=b)

    def _outer_products(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        for a, b, weight in zip(left.split(self.counts), right.split(self.counts), out):
            torch.mm(a.mT, b, out=weight)
