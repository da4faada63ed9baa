"""A model's tensors by name: what they are, and in what two models differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe.checkpoint.files import storage_id
from moe.errors import CheckpointError


@dataclass(frozen=True)
class TensorSpec:
    """What one entry of a model's state is."""

    shape: tuple[int, ...]
    """Its sizes; empty for a scalar."""

    dtype: str
    """As torch names it, without ``torch.``: "bfloat16"."""

    tied_to: str | None = None
    """The earlier name of the same memory (an output head tied to the embedding): stored there, once."""


Architecture = Mapping[str, TensorSpec]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The entries of ``model.state_dict()``, which must be tensors.

    Raises:
        CheckpointError: one is not (a module's ``get_extra_state``).
    """
    entries: dict[str, Any] = model.state_dict()
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"model.state_dict()[{name!r}] is a {type(value).__name__}, not a tensor")
    return entries


def architecture(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Describe a model's tensors; of several names for one tensor, all but the first are tied to it."""
    first_names: dict[tuple[object, ...], str] = {}
    specs = {}
    for name, tensor in tensors.items():
        place = (storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        first = first_names.setdefault(place, name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        specs[name] = TensorSpec(tuple(tensor.shape), dtype, None if first == name else first)
    return specs


def differences(checkpoint: Architecture, model: Architecture) -> list[str]:
    """Say in what a model differs from a checkpoint, one line a tensor, none when they fit."""
    found = []
    for name, saved in checkpoint.items():
        if name not in model:
            found.append(f"{name}: not in the model, {saved.dtype}{list(saved.shape)} in the checkpoint")
            continue
        wanted = model[name]
        for field in ("shape", "dtype", "tied_to"):
            ours, theirs = getattr(saved, field), getattr(wanted, field)
            if ours != theirs:
                found.append(f"{name}: {field} {ours} in the checkpoint, {theirs} in the model")
                break
    missing = (name for name in model if name not in checkpoint)
    found += [
        f"{name}: not in the checkpoint, {model[name].dtype}{list(model[name].shape)} in the model" for name in missing
    ]
    return found


def to_json(specs: Architecture) -> dict[str, dict[str, Any]]:
    """An architecture as JSON; ``tied_to`` is there only where a tensor is tied."""
    return {
        name: {"shape": list(spec.shape), "dtype": spec.dtype} | ({"tied_to": spec.tied_to} if spec.tied_to else {})
        for name, spec in specs.items()
    }


def from_json(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorSpec]:
    """Undo ``to_json``."""
    return {name: TensorSpec(tuple(e["shape"]), e["dtype"], e.get("tied_to")) for name, e in entries.items()}
