"""What is compared: a case, the tensors of a case, and something that computes it.

Sizes: T tokens, D dim, E experts, F hidden_dim, K experts per token, N = T * K rows.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn


class UnavailableError(Exception):
    """A contestant cannot take part; the message says why."""


@final
@dataclass(frozen=True)
class Case:
    """The sizes of one comparison."""

    name: str
    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    skew: float = 0.0
    """Logits get ``-skew * log(rank)`` of their expert."""

    @property
    def rows(self) -> int:
        """N, what all experts together compute."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> int:
        """Of the six products of forward and backward: each is N times D times F, and the two of "up" are twice so."""
        return 3 * self.forward_flops

    @property
    def forward_flops(self) -> int:
        """Of the two products of the forward pass."""
        return 2 * self.rows * self.dim * 3 * self.hidden_dim

    def __str__(self) -> str:
        sizes = f"T={self.tokens} D={self.dim} F={self.hidden_dim} E={self.num_experts} K={self.top_k}"
        return f"{self.name}: {sizes}" + (f" skew={self.skew:g}" if self.skew else "")


@final
@dataclass(frozen=True)
class Problem:
    """The tensors that every contestant gets; parameters are views of them, nothing is copied unless a layout asks."""

    case: Case
    x: Tensor
    """``(T, D)``."""
    up_weight: Tensor
    """``(E, 2F, D)``, the gate's rows first."""
    down_weight: Tensor
    """``(E, D, F)``."""
    router_weight: Tensor
    """``(E, D)``."""
    output_grad: Tensor
    """``(T, D)``, what the backward pass starts from."""


def make_problem(case: Case, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Draw a problem; the same on every device.

    The first feature of every token is 1, so that the router's first column is a bias and a skew needs no code in the
    contestants: products that keep the variance, and logits of deviation 1 without it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    T, D, F, E = case.tokens, case.dim, case.hidden_dim, case.num_experts
    x, router = draw(T, D), draw(E, D, scale=D**-0.5)
    x[:, 0] = 1.0
    rank = torch.randperm(E, generator=generator) + 1
    router[:, 0] = -case.skew * rank.log()
    tensors = (x, draw(E, 2 * F, D, scale=D**-0.5), draw(E, D, F, scale=F**-0.5), router, draw(T, D))
    return Problem(case, *(tensor.to(device, dtype) for tensor in tensors))


class Contestant(ABC):
    """One way to compute a problem."""

    @abstractmethod
    def ready(self, training: bool) -> None:
        """Drop what the last step left, and set the mode; not timed."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The forward pass alone; called under ``torch.no_grad``."""

    @abstractmethod
    def step(self) -> Tensor:
        """Forward and backward; gradients stay until ``ready``."""


@final
class Layer(Contestant):
    """A contestant that autograd differentiates.

    Args:
        problem: what it computes.
        module: holds the parameters.
        run: ``(T, D)`` to ``(T, D)``.
        gradients: after a step, those of "up", "down" and "router" in the problem's layout; None for what computes
            something else than the mixture, and has no error therefore.
        route: ``(T, D)`` to the ids ``(T, K)`` that its own router chooses.
    """

    def __init__(
        self,
        problem: Problem,
        module: nn.Module,
        run: Callable[[Tensor], Tensor],
        gradients: Callable[[], Mapping[str, Tensor]] | None = None,
        route: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.x = problem.x.detach().requires_grad_()
        self.output_grad = problem.output_grad
        self.module, self.run, self.gradients, self.route = module, run, gradients, route

    def ready(self, training: bool) -> None:
        """Gradients start from nothing, as after ``zero_grad(set_to_none=True)``."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        self.module.train(training)

    def forward(self) -> Tensor:
        """The layer's output."""
        return self.run(self.x)

    def step(self) -> Tensor:
        """The layer's output, after its backward pass."""
        y = self.run(self.x)
        y.backward(self.output_grad)
        return y


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that a step has left."""
    if parameter.grad is None:
        raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} got no gradient")
    return parameter.grad


def memory_size(device: str) -> int:
    """Bytes of the device's memory."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
