"""From a checkpoint into a model: everything is checked before anything is changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.checkpoint.files import MODEL, OPTIMIZER, RANDOM, read_tensors
from moe.checkpoint.model_state import architecture, differences, model_tensors
from moe.checkpoint.optimizer_state import decode_optimizer, restore_optimizer
from moe.checkpoint.random_state import restore_random
from moe.checkpoint.record import Checkpoint, read_checkpoint
from moe.errors import CheckpointError

_MOST_NAMED = 8
"""Differing tensors that a message names; the rest are counted."""


def load_model(path: Path | str, model: nn.Module) -> Mapping[str, Any]:
    """Load a model's tensors from a checkpoint folder, for inference: no optimizer, no random generators.

    Args:
        path: folder of one checkpoint; of its files, those of the optimizer and the generators may be missing.
        model: of the architecture that was saved, on any device.

    Returns:
        The ``state`` that was saved with it.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another architecture; the model is then unchanged.
    """
    checkpoint = read_checkpoint(Path(path), files=(MODEL,))
    _check_architecture(checkpoint, model)
    _restore_model(checkpoint, model)
    return checkpoint.state


def load_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Mapping[str, Any]:
    """Load a model, an optimizer and the random generators; see ``CheckpointStore.load``."""
    _check_architecture(checkpoint, model)
    content = None
    if optimizer is not None:
        # Cloned, because an optimizer keeps the tensors it is given, and these are pages of the file.
        tensors = {name: tensor.clone() for name, tensor in read_tensors(checkpoint.path / OPTIMIZER).items()}
        content = decode_optimizer(checkpoint.optimizer, tensors, optimizer, model)
    random_tensors = read_tensors(checkpoint.path / RANDOM)
    _restore_model(checkpoint, model)
    if optimizer is not None and content is not None:
        restore_optimizer(optimizer, content)
    restore_random(checkpoint.random, random_tensors)
    return checkpoint.state


def _check_architecture(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a model whose tensors are not, by name, shape, dtype and ties, those of the checkpoint."""
    found = differences(checkpoint.architecture, architecture(model_tensors(model)))
    if found:
        more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise CheckpointError(
            f"{checkpoint.path} is of another architecture than the model, {len(found)} tensors differ: "
            f"{'; '.join(found[:_MOST_NAMED])}{more}"
        )


def _restore_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the stored tensors into the model's."""
    tensors = read_tensors(checkpoint.path / MODEL)
    specs = checkpoint.architecture
    model.load_state_dict({name: tensors[spec.tied_to or name] for name, spec in specs.items()}, strict=True)
