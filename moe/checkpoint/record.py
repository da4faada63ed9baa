"""One checkpoint folder: what is in it, how it is written and read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.checkpoint import model_state
from moe.checkpoint.files import (
    FILES,
    MODEL,
    OPTIMIZER,
    RANDOM,
    RECORD,
    read_bytes,
    read_sums,
    verify_file,
    write_bytes,
    write_sums,
    write_tensors,
)
from moe.checkpoint.optimizer_state import encode_optimizer
from moe.checkpoint.random_state import encode_random
from moe.checkpoint.tree import decode, encode
from moe.errors import CheckpointError

FORMAT = 1
"""Raised when files are written that an older version would read wrongly."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was whole when it was read; its tensors are still on the disk."""

    path: Path
    """Its folder."""

    step: int
    """The optimizer steps done."""

    state: Mapping[str, Any]
    """What the caller of ``save`` gave."""

    architecture: Mapping[str, model_state.TensorSpec]
    """The tensors of its model, by name."""

    optimizer: Mapping[str, Any]
    """Its optimizer: class, groups and state, tensors by name of those in the file."""

    random: Mapping[str, Any]
    """Its random generators, tensors by name of those in the file."""


def write_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write the files of a checkpoint into an empty folder and wait until the disk has them.

    Raises:
        CheckpointError: something in the model, the optimizer or ``state`` is of a kind that cannot be stored.
    """
    tensors = model_state.model_tensors(model)
    architecture = model_state.architecture(tensors)
    optimizer_record, optimizer_tensors = encode_optimizer(optimizer, model)
    random_record, random_tensors = encode_random()
    strays: dict[str, Tensor] = {}
    state_record = encode(state, "state", strays)
    if strays:
        raise CheckpointError(f"{next(iter(strays))} is a tensor: state holds numbers, str, lists, tuples and dicts")

    write_tensors(folder / MODEL, {name: t for name, t in tensors.items() if architecture[name].tied_to is None})
    write_tensors(folder / OPTIMIZER, optimizer_tensors)
    write_tensors(folder / RANDOM, random_tensors)
    record = {
        "format": FORMAT,
        "step": step,
        "state": state_record,
        "architecture": model_state.to_json(architecture),
        "optimizer": optimizer_record,
        "random": random_record,
        "sizes": {name: (folder / name).stat().st_size for name in (MODEL, OPTIMIZER, RANDOM)},
    }
    write_bytes(folder / RECORD, json.dumps(record, indent=1, allow_nan=False).encode())
    write_sums(folder)


def read_checkpoint(path: Path, files: Sequence[str] = FILES) -> Checkpoint:
    """Verify a checkpoint and read what it says of itself.

    Args:
        path: its folder.
        files: which files to hold against their checksums; ``checkpoint.json`` always is.

    Raises:
        CheckpointError: there is no checkpoint, a file is missing, differs from what was written, or a newer version
            of this library wrote it.
    """
    try:
        sums = read_sums(path)
        text = read_bytes(path / RECORD)
        if hashlib.sha256(text).hexdigest() != sums[RECORD]:
            raise CheckpointError(f"{RECORD} does not have the SHA-256 that was written")
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise CheckpointError(f"its format is {record['format']}, this version of moe reads {FORMAT}")
        for name in files:
            if name != RECORD:
                verify_file(path / name, record["sizes"][name], sums[name])
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no whole checkpoint: {error}") from error
    return Checkpoint(
        path=path,
        step=record["step"],
        state=decode(record["state"], {}),
        architecture=model_state.from_json(record["architecture"]),
        optimizer=record["optimizer"],
        random=record["random"],
    )
