"""Checkpoints that are whole or not there: written atomically, verified when read, resumed from bit for bit.

Example::

    store = CheckpointStore(run_folder / "checkpoints", keep=3)
    if (checkpoint := store.latest()) is not None:
        state = store.load(checkpoint, model, optimizer)
    ...
    store.save(step, model, optimizer, {"tokens": tokens, "loader": loader.position()})

A checkpoint is a folder ``step_00001234`` of ordinary files: ``model.safetensors``, ``optimizer.safetensors``,
``rng.safetensors``, ``checkpoint.json`` (all that is not a tensor) and ``SHA256SUMS``, which ``sha256sum -c`` reads.
"""

from moe.checkpoint.files import CheckpointWarning
from moe.checkpoint.loading import load_model
from moe.checkpoint.model_state import TensorSpec
from moe.checkpoint.record import Checkpoint, read_checkpoint
from moe.checkpoint.store import CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore", "CheckpointWarning", "TensorSpec", "load_model", "read_checkpoint"]
