"""Faults in pipeline stages.

Each function takes what it calls once it has changed something, and returns what it replaces.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from moe.layer import balance_loss
from moe.parallel.pipeline import Pipeline
from moe.verify.planting import Fire, Patch


def balance_of_last_stage(fire: Fire) -> list[Patch]:
    """Only the stage that computes the loss adds balance losses to it."""
    original = Pipeline._add_balance

    def add_balance(self: Pipeline, stage: Any, args: Any, output: Tensor) -> Tensor:
        if stage.head is not None:
            return original(self, stage, args, output)
        if balance_loss(stage):
            fire()
        return output

    return [(Pipeline, "_add_balance", add_balance)]


def sum_of_microbatches(fire: Fire) -> list[Patch]:
    """The loss is not divided by the number of micro-batches."""
    original = Pipeline._scaled_loss

    def scaled_loss(self: Pipeline, logits: Tensor, targets: Tensor) -> Tensor:
        if self.microbatches > 1:
            fire()
        return original(self, logits, targets) * self.microbatches

    return [(Pipeline, "_scaled_loss", scaled_loss)]


def cleared_gradients(fire: Fire) -> list[Patch]:
    """Gradients are left to what PyTorch does when a batch of another shape needs another schedule."""

    @contextmanager
    def set_aside(self: Pipeline) -> Iterator[None]:
        if self.mesh.degrees.dp > 1 and any(p.grad is not None for _, p in self.parallel.named_parameters()):
            fire()
        yield

    return [(Pipeline, "_set_aside_gradients", set_aside)]
