"""Sharded and replicated data parallelism: FSDP2 over dense parameters and over experts, each on its own mesh."""

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard

from moe.parallel.mesh import ParallelMesh


def shard_data_parallel(
    model: nn.Module,
    experts: Iterable[nn.Parameter],
    mesh: ParallelMesh,
    blocks: Sequence[nn.Module],
    mixed_precision: MixedPrecisionPolicy,
) -> None:
    """Apply FSDP2 to the blocks and then to what is left of the model, in place.

    A block's experts are gathered with it, over their own mesh. Gradients are averaged over the ranks that hold a
    parameter, which for dense ones is the mean over data ranks; what experts lack to it the dispatcher has put in.

    Args:
        model: on its device.
        experts: its parameters that live on the mesh of experts.
        mesh: of this rank.
        blocks: modules that are gathered and freed as one; outermost ones only.
        mixed_precision: of FSDP2.
    """
    degrees = mesh.degrees
    if degrees.dp == 1 and degrees.edp == 1:
        return
    dense = mesh.dense["dp_replicate", "dp_shard"] if degrees.dp_replicate > 1 else mesh.dense["dp_shard"]
    expert_parameters = set(experts)
    # FSDP2 wants one mesh object where both meshes are the same ranks.
    elsewhere = None if degrees.edp == degrees.dp else ShardPlacementResult(Shard(0), _experts_mesh(mesh))
    # Experts of which there is one copy are nobody's to average; nor is anything where the dense part has one.
    ignored = expert_parameters if degrees.edp == 1 else set()

    def placement(parameter: nn.Parameter) -> ShardPlacementResult | None:
        return elsewhere if parameter in expert_parameters else None

    for module in (*blocks, model):
        sharded = fully_shard(
            module, mesh=dense, shard_placement_fn=placement, mp_policy=mixed_precision, ignored_params=ignored
        )
        if dist.get_backend(mesh.data) == "gloo":  # which can sum, but not average
            sharded.set_force_sum_reduction_for_comms(True)


def outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of each outermost ``nn.ModuleList`` or ``nn.ModuleDict``: a model's layers, mostly."""
    blocks: list[nn.Module] = []
    pending = [model]
    while pending:
        module = pending.pop(0)
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks += list(child)
            elif isinstance(child, nn.ModuleDict):
                blocks += list(child.values())
            else:
                pending.append(child)
    return blocks


def _experts_mesh(mesh: ParallelMesh) -> FSDPMeshInfo:
    if mesh.degrees.edp_replicate > 1:
        both = mesh.experts["edp_replicate", "edp_shard"]
        return HSDPMeshInfo(both, shard_mesh_dim=1, replicate_mesh_dim=0)
    return FSDPMeshInfo(mesh.experts["edp_shard"], shard_mesh_dim=0)
