"""An optimizer's state by the names of the parameters, so that it outlives their order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe.checkpoint.tree import decode, encode
from moe.errors import CheckpointError


def encode_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take an optimizer's state apart.

    Args:
        optimizer: of any class whose ``state_dict`` holds state by parameter, in any number of groups.
        model: names its parameters.

    Returns:
        JSON (class, groups with the names of their parameters and their options, state without its tensors), and
        the tensors, named ``<parameter>/<key>``: ``blocks.0.ffn.up_weight/exp_avg``.

    Raises:
        CheckpointError: it holds a parameter that is not the model's, or something that cannot be stored.
    """
    content = optimizer.state_dict()
    names = _names(optimizer, model)
    by_index = {
        index: name
        for packed, group in zip(content["param_groups"], names)
        for index, name in zip(packed["params"], group)
    }
    foreign = [repr(key) for key in content["state"] if key not in by_index]
    foreign += [repr(key) for key in content if key not in ("state", "param_groups")]
    if foreign:
        raise CheckpointError(f"optimizer.state_dict() holds {', '.join(foreign)}, which belongs to no parameter")
    tensors: dict[str, Tensor] = {}
    groups = []
    for number, (packed, group) in enumerate(zip(content["param_groups"], names)):
        options = {key: value for key, value in packed.items() if key != "params"}
        groups.append({"parameters": group, "options": encode(options, f"param_groups/{number}", tensors)})
    state = {by_index[index]: encode(entry, by_index[index], tensors) for index, entry in content["state"].items()}
    return {"class": type(optimizer).__qualname__, "groups": groups, "state": state}, tensors


def decode_optimizer(
    record: Mapping[str, Any], tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """Put a stored state together for an optimizer, which is not changed.

    Args:
        record: the JSON of ``encode_optimizer``.
        tensors: its tensors.
        optimizer: who will load it; its parameters may stand in another order, but in the same groups.
        model: names its parameters.

    Returns:
        What ``restore_optimizer`` loads.

    Raises:
        CheckpointError: another class of optimizer, other groups, or other parameters in them.
    """
    if record["class"] != type(optimizer).__qualname__:
        raise CheckpointError(f"optimizer is a {type(optimizer).__qualname__}, the checkpoint's a {record['class']}")
    names = _names(optimizer, model)
    if len(names) != len(record["groups"]):
        raise CheckpointError(f"optimizer has {len(names)} groups, the checkpoint's has {len(record['groups'])}")
    packed_groups = optimizer.state_dict()["param_groups"]
    groups: list[dict[str, Any]] = []
    indices: dict[str, int] = {}
    for number, (saved, group, packed) in enumerate(zip(record["groups"], names, packed_groups)):
        odd = sorted(set(saved["parameters"]) ^ set(group))
        if odd:
            where = "the optimizer" if odd[0] in group else "the checkpoint"
            raise CheckpointError(f"group {number} of optimizer: {odd[0]} is in it in {where} only")
        groups.append(decode(saved["options"], tensors) | {"params": packed["params"]})
        indices.update(zip(group, packed["params"]))
    state = {indices[name]: decode(entry, tensors) for name, entry in record["state"].items()}
    return {"state": state, "param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load what ``decode_optimizer`` returned: on the devices that torch puts it, in the dtypes that were stored."""
    optimizer.load_state_dict(content)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in content["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters):
        if index in content["state"]:
            # load_state_dict rounds state to its parameter's dtype: float32 moments of bfloat16 weights would be lost.
            optimizer.state[parameter] = _with_dtypes_of(content["state"][index], optimizer.state[parameter])


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                shape = list(parameter.shape)
                raise CheckpointError(
                    f"group {number} of optimizer: parameter {position}, of shape {shape}, is not one of the model's"
                )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _with_dtypes_of(saved: Any, loaded: Any) -> Any:
    """The nested value ``loaded``, each tensor replaced by the saved one, on its device, where the dtypes differ."""
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {key: _with_dtypes_of(value, loaded[key]) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_with_dtypes_of(value, other) for value, other in zip(saved, loaded))
    return saved
