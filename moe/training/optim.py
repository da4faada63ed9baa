"""The optimizer of a run."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from moe.config import require_positive
from moe.errors import ConfigError


@runtime_checkable
class Named(Protocol):
    """What has parameters with names: a module, or what a process has of a spread model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each with its name."""
        ...


def make_optimizer(
    model: Named,
    *,
    peak: float,
    weight_decay: float = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, not on norms and biases.

    Args:
        model: its parameters are taken as they are.
        peak: the highest learning rate; a `moe.training.schedule.Schedule` sets that of each step.
        weight_decay: decoupled decay of matrices.
        betas: decay of the moments.
        eps: added to the root of the second moment.

    Raises:
        ConfigError: ``peak`` or ``eps`` is not positive, ``weight_decay`` is negative, ``betas`` are not two numbers
            below 1.

    Source: Loshchilov & Hutter 2017, arXiv:1711.05101.
    """
    require_positive(peak=peak, eps=eps)
    if not (isinstance(weight_decay, int | float) and weight_decay >= 0):
        raise ConfigError(f"weight_decay={weight_decay!r} must be a number, 0 or more")
    try:
        first, second = betas
    except (TypeError, ValueError):
        raise ConfigError(f"betas={betas!r} must be two numbers") from None
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ConfigError(f"betas={betas!r} must be at least 0 and below 1")
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # Biases of experts are stacked: two dimensions, and still vectors.
        is_vector = parameter.dim() < 2 or name.endswith("_bias")
        (vectors if is_vector else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=peak, betas=(first, second), eps=eps)
