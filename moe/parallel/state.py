"""The whole state of a model that is spread over ranks, and of its optimizer: out of the parts, and back into them.

What comes out does not depend on the degrees, so that a run can go on with others.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from moe.balance import Balancer
from moe.errors import CheckpointError
from moe.parallel.gather import gather
from moe.parallel.norm import local_part
from moe.parallel.parallelize import Parallel


@final
@dataclass(frozen=True)
class WholeState:
    """As one process would have it, on the CPU."""

    tensors: Mapping[str, Tensor]
    """Parameters and persistent buffers."""
    optimizer: Mapping[str, Mapping[str, Any]]
    """The optimizer's state of each parameter, by the parameter's name."""


def gather_state(parallel: Parallel, optimizer: torch.optim.Optimizer) -> WholeState | None:
    """Put the state together on rank 0; collective.

    Each part travels once, one parameter after another. Waits for the device.

    Args:
        parallel: the model that is spread.
        optimizer: over its parameters; what it keeps for one is of the parameter's shape, or the same on all ranks.

    Returns:
        None on ranks other than 0.
    """
    reshard(parallel)
    own = dict(parallel.named_parameters())
    sent = {id(parameter) for name, parameter in own.items() if _is_sender(parallel, name)}

    def collect(of: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        def part(parameter: Tensor) -> Tensor | None:
            held = of(parameter)
            if isinstance(held, DTensor):
                held = held.full_tensor()  # every rank takes part, also one whose copy is not needed
            return held if id(parameter) in sent else None

        return {whole.name: whole.tensor for whole in gather(parallel, part)}

    tensors = collect(lambda parameter: parameter)
    small = {name: _small_state(optimizer.state.get(parameter, {}), parameter) for name, parameter in own.items()}
    keys = {key for state in optimizer.state.values() for key, value in state.items() if torch.is_tensor(value)}
    moments = {key: collect(partial(_moment, optimizer, key)) for key in sorted(_union(keys))}
    told = _to_first({"buffers": dict(_buffers(parallel)), "small": small})
    if told is None:
        return None
    state: dict[str, dict[str, Any]] = {}
    for each in reversed(told):
        tensors |= each["buffers"]
        state |= {name: dict(values) for name, values in each["small"].items()}
    for key, whole in moments.items():
        for name, tensor in whole.items():
            state[name][key] = tensor
    return WholeState(tensors, {name: values for name, values in state.items() if values})


def load_state(parallel: Parallel, optimizer: torch.optim.Optimizer, whole: WholeState) -> None:
    """Give every rank its part of a state, in place.

    Args:
        parallel: the model that is spread, over whatever degrees.
        optimizer: over its parameters; its groups and their options stay.
        whole: the same on all ranks.

    Raises:
        CheckpointError: something that the model has is missing, or of another shape.
    """
    reshard(parallel)
    for name, parameter in parallel.named_parameters():
        shard = parallel.shards[name]
        found = whole.tensors.get(name)
        if found is None or tuple(found.shape) != shard.shape:
            there = "nothing" if found is None else tuple(found.shape)
            raise CheckpointError(f"parameter {name} has shape {shard.shape}, and the state {there}")
        with torch.no_grad():
            local_part(parameter).copy_(local_part(_like(shard.cut(found), parameter)))
        if name not in whole.optimizer:
            optimizer.state.pop(parameter, None)
            continue
        optimizer.state[parameter] = {
            key: _like(shard.cut(value), parameter) if _is_moment(value, shard.shape) else _copied(value)
            for key, value in whole.optimizer[name].items()
        }
    for name, buffer in _buffers(parallel):
        buffer.copy_(whole.tensors[name])
    for part in parallel.parts:
        for module in part.modules():
            if isinstance(module, Balancer):
                module.read_steps()


def reshard(parallel: Parallel) -> None:
    """Give back what FSDP2 has gathered: after a pass without backward it still holds whole parameters."""
    for part in parallel.parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _is_sender(parallel: Parallel, name: str) -> bool:
    """Whether this rank is the first of those that hold its part of a parameter."""
    mesh, axes = parallel.mesh, parallel.shards[name].axes
    over_experts = bool({"ep", "etp"}.intersection(axes))
    shape = mesh.degrees.expert_shape if over_experts else mesh.degrees.dense_shape
    return all(mesh.rank_on(axis) == 0 for axis in shape if axis != "pp" and axis not in axes)


def _buffers(parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    """The persistent ones, which are the same on all ranks that have them."""
    for part in parallel.parts:
        parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        for name, tensor in part.state_dict(keep_vars=True).items():
            if name not in parameters and not isinstance(tensor, nn.Parameter):
                yield name, tensor


def _moment(optimizer: torch.optim.Optimizer, key: str, parameter: Tensor) -> Tensor | None:
    value = optimizer.state.get(parameter, {}).get(key)
    return value if _is_moment(value, tuple(parameter.shape)) else None


def _is_moment(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) == shape


def _small_state(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """What an optimizer keeps for a parameter and is the same on all ranks, such as the number of its steps."""
    return {key: _copied(value) for key, value in state.items() if not _is_moment(value, tuple(parameter.shape))}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    """A part on the parameter's device, divided as FSDP2 divides the parameter; nothing is sent."""
    part = part.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return part
    return distribute_tensor(part, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _union(keys: set[str]) -> set[str]:
    """Names that any rank has: a stage of a pipeline may have nothing to optimize."""
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, keys)
    return set().union(*everywhere)


def _to_first(own: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What every rank has, on rank 0."""
    told: list[dict[str, Any]] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    on_cpu = torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), own)
    dist.gather_object(on_cpu, told)
    return told
