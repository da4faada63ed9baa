"""The two device meshes of a run, and the groups that talk to each other."""

from typing import final

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe.errors import ConfigError
from moe.parallel.degrees import Degrees, rank_table, spans_nodes


@final
class ParallelMesh:
    """Where this rank stands, for dense parameters and for experts.

    Making it is collective: every rank does, in the same order.

    Args:
        degrees: the size of each axis.
        device_type: "cpu" or "cuda".
        node_size: consecutive ranks that share a node. Where the ranks that hold all experts once are on several nodes,
            a token then crosses to each node at most once, see :mod:`moe.parallel.hierarchical`. None: all links count
            alike.

    Attributes:
        dense: DeviceMesh ``(pp, dp_replicate, dp_shard, tp)``.
        experts: DeviceMesh ``(pp, edp_replicate, edp_shard, ep, etp)`` over the same ranks.
        world: group of all ranks.
        stage: group of the ranks of this pipeline stage.
        data: group of the ranks of a stage that see different data.
        exchange: group of the ranks that hold all experts once, ``ep`` major.
        nodes: two parts of ``exchange``, the ranks with the same place on their nodes and those of this node; None
            where it is on one node, or without ``node_size``.

    Raises:
        ConfigError: there is no process group, or it has another size than the degrees say; or nodes of ``node_size``
            ranks and the ranks that hold all experts once do not divide each other.
    """

    def __init__(self, degrees: Degrees, device_type: str = "cpu", *, node_size: int | None = None) -> None:
        if not dist.is_initialized():
            raise ConfigError(
                f"degrees {degrees} need a process group: start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        if dist.get_world_size() != degrees.world_size:
            raise ConfigError(
                f"degrees {degrees} need {degrees.world_size} ranks, but there are {dist.get_world_size()}"
            )
        self.degrees, self.device_type = degrees, device_type
        self.dense = _mesh(device_type, degrees.dense_shape)
        self.experts = _mesh(device_type, degrees.expert_shape)
        self.world = dist.distributed_c10d._get_default_group()
        self.stage = self.dense["dp_replicate", "dp_shard", "tp"]._flatten("stage").get_group()
        self.data = self.dense["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        self.exchange = self.experts["ep", "etp"]._flatten("exchange").get_group()
        self.nodes: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        held = degrees.ep * degrees.etp
        if node_size is not None and spans_nodes(degrees, node_size):
            shape = {"copies": degrees.world_size // held, "nodes": held // node_size, "node": node_size}
            mesh = _mesh(device_type, shape)
            self.nodes = mesh.get_group("nodes"), mesh.get_group("node")

    @property
    def data_rank(self) -> int:
        """Which part of a batch this rank sees, of ``degrees.dp``."""
        return dist.get_rank(self.data)

    def rank_on(self, axis: str) -> int:
        """This rank's place on an axis of either mesh."""
        mesh = self.dense if axis in self.dense.mesh_dim_names else self.experts  # type: ignore[operator]
        return mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks that differ from this one on one axis only."""
        mesh = self.dense if axis in self.dense.mesh_dim_names else self.experts  # type: ignore[operator]
        return mesh.get_group(axis)

    def table(self) -> str:
        """Every rank with both its addresses, one a line."""
        return rank_table(self.degrees)


def _mesh(device_type: str, shape: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
