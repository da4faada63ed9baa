"""The judge: the same mixture in float64, on the same rounded numbers.

Sizes: T tokens, D dim, E experts, F hidden_dim, K experts per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from peers.contestant import Layer, Problem
from torch import Tensor
from torch.nn import functional as F


@final
@dataclass(frozen=True)
class Truth:
    """What float64 says."""

    y: Tensor
    """``(T, D)``."""
    gradients: Mapping[str, Tensor]
    """Of "x", "up", "down" and "router"."""
    expert_ids: Tensor
    """``(T, K)``, rising."""
    tokens_per_expert: Tensor
    """``(E,)``."""


@final
@dataclass(frozen=True)
class Errors:
    """How far a contestant is from float64; a relative error is that of the Frobenius norm."""

    output: float
    gradient: float
    """The largest of the four gradients'."""
    gradient_name: str
    """Which that is."""
    moved_tokens: int
    """Tokens that went to other experts than in float64."""


def compute_truth(problem: Problem) -> Truth:
    """The mixture and its gradients in float64.

    Every expert is summed with a weight that is 0 for a token that did not choose it; those rows are left out, which
    changes no number.
    """
    top_k = problem.case.top_k
    x, up, down, router = (
        tensor.detach().double().requires_grad_()
        for tensor in (problem.x, problem.up_weight, problem.down_weight, problem.router_weight)
    )
    scores = (x @ router.mT).softmax(-1)
    ids = scores.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]  # equals: the lower id
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
    weights = scores * chosen
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert, (expert_up, expert_down) in enumerate(zip(up.unbind(), down.unbind())):
        tokens = chosen[:, expert].nonzero()[:, 0]
        gate, value = F.linear(x[tokens], expert_up).chunk(2, dim=-1)
        out = F.linear(gate * torch.sigmoid(gate) * value, expert_down)
        y = y.index_add(0, tokens, out * weights[tokens, expert, None])
    y.backward(problem.output_grad.double())
    leaves = {"x": x, "up": up, "down": down, "router": router}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    return Truth(y.detach(), gradients, ids.sort(-1).values, chosen.sum(0))


def judge(layer: Layer, y: Tensor, truth: Truth) -> Errors | None:
    """Compare a step that has just been taken; None for a contestant that computes something else.

    Args:
        layer: holds the step's gradients.
        y: the step's output.
        truth: of the same problem.
    """
    if layer.gradients is None or layer.route is None:
        return None
    assert layer.x.grad is not None
    found = {"x": layer.x.grad, **layer.gradients()}
    errors = {name: relative_error(found[name], wanted) for name, wanted in truth.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    output = relative_error(y.detach(), truth.y)
    with torch.no_grad():
        ids = layer.route(layer.x).long().sort(-1).values
    moved = int((ids != truth.expert_ids).any(-1).sum())
    return Errors(output, errors[worst], worst, moved)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of what is wanted."""
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)} is compared with {tuple(wanted.shape)}")
    return ((found.double() - wanted).norm() / wanted.norm()).item()
