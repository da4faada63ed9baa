"""How a batch goes through a model, and where its state lies: on one device, behind what many answer to as well.

The training loop talks to a `Runner` and does not know which one it is; `moe.training.spread` has the other.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.checkpoint import Checkpoint, CheckpointStore
from moe.layer import balance_loss
from moe.training.data import Batch
from moe.training.ranks import Alone, Ranks

Autocast = AbstractContextManager[None]


@runtime_checkable
class Runner(Protocol):
    """A model on its devices."""

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        ...

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules in this process: the model, or stages of it."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those in this process, by their names in the whole model."""
        ...

    def share(self, batch: Batch) -> Batch:
        """The sequences of a batch of the run that this process takes."""
        ...

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradients, times ``scale``.

        Args:
            batch: this process's share.
            scale: 1 / micro-batches in the step.
            autocast: entered around the forward pass.

        Returns:
            Mean cross entropy, nats per token, and what balances, each a scalar.
        """
        ...

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """The cross entropy of all tokens of this process's share; scalar float64."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Shorten all gradients together to a norm of ``max_norm``; returns the norm before."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes that have different shares of a batch."""
        ...

    def merge(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of the model's layers by name, in whichever process they are."""
        ...

    def save(
        self, store: CheckpointStore, step: int, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint of the whole model; see ``CheckpointStore.save``."""
        ...

    def newest(self, store: CheckpointStore) -> Checkpoint | None:
        """The newest good checkpoint; see ``CheckpointStore.latest``."""
        ...

    def load(self, store: CheckpointStore, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> Mapping:
        """Take the whole model's state, or what is here of it; see ``CheckpointStore.load``."""
        ...


@final
class OneDevice:
    """A whole model on one device.

    Args:
        model: token ids ``(B, S)`` to logits ``(B, S, V)``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ranks: Ranks = Alone()

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The model."""
        return (self.model,)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's."""
        return self.model.named_parameters()

    def share(self, batch: Batch) -> Batch:
        """All of it."""
        return batch

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """See `Runner.forward_backward`."""
        return forward_backward(self.model, batch, scale, autocast)

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """See `Runner.summed_loss`."""
        return summed_loss(self.model, batch, autocast)

    def clip(self, max_norm: float) -> Tensor:
        """See `Runner.clip`."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def total(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def merge(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values themselves."""
        return dict(values)

    def save(
        self, store: CheckpointStore, step: int, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """See `Runner.save`."""
        store.save(step, self.model, optimizer, state)

    def newest(self, store: CheckpointStore) -> Checkpoint | None:
        """See `Runner.newest`."""
        return store.latest()

    def load(self, store: CheckpointStore, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> Mapping:
        """See `Runner.load`."""
        return store.load(checkpoint, self.model, optimizer)


def forward_backward(model: nn.Module, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
    """A micro-batch through a model that is one module; see `Runner.forward_backward`."""
    device = next(model.parameters()).device
    with autocast:
        logits = model(batch["inputs"].to(device))
    loss = cross_entropy(logits, batch["targets"].to(device))
    extra = balance_loss(model)
    ((loss + extra) * scale).backward()
    return loss.detach(), extra.detach()


def summed_loss(model: nn.Module, batch: Batch, autocast: Autocast) -> Tensor:
    """The cross entropy of all tokens under a model that is one module; see `Runner.summed_loss`."""
    device = next(model.parameters()).device
    with autocast:
        logits = model(batch["inputs"].to(device))
    return cross_entropy(logits, batch["targets"].to(device), reduction="sum").double()


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The loss of a language model.

    Args:
        logits: ``(B, S, V)``; the loss is computed in float32.
        targets: ``(B, S)`` ids.
        reduction: "mean" or "sum" over all tokens.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
