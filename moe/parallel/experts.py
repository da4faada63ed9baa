"""Which part of each expert's parameters a rank holds, and the cutting of a whole layer down to it."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.experts import GroupedExperts
from moe.parallel.dispatcher import even_bounds
from moe.parallel.mesh import ParallelMesh


@final
@dataclass(frozen=True)
class Shard:
    """The part of a parameter that a rank holds, before data parallelism divides it further.

    The up projection of a gated expert is two pieces: the gate's rows and the values' rows.
    """

    shape: tuple[int, ...]
    """Of the whole parameter."""
    pieces: tuple[tuple[slice, ...], ...]
    """Where in the whole the part lies; one piece after another along ``dim``."""
    dim: int
    axes: tuple[str, ...]
    """Mesh axes over which the parts differ."""

    @classmethod
    def whole(cls, parameter: Tensor) -> "Shard":
        """All of it."""
        return cls(tuple(parameter.shape), (tuple(slice(0, size) for size in parameter.shape),), 0, ())

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a whole parameter."""
        return torch.cat([whole[piece] for piece in self.pieces], self.dim)

    def paste(self, part: Tensor, whole: Tensor) -> None:
        """Write the part to its place in a whole parameter."""
        sizes = [piece[self.dim].stop - piece[self.dim].start for piece in self.pieces]
        for piece, values in zip(self.pieces, part.split(sizes, self.dim)):
            whole[piece] = values


def shard_experts(experts: GroupedExperts, mesh: ParallelMesh) -> dict[str, Shard]:
    """Cut a layer's experts down to those of this rank, in place.

    Args:
        experts: whole, the same on all ranks; or on the meta device.
        mesh: ``ep`` divides the experts, as evenly as they go; ``etp`` each one's hidden dimension.

    Returns:
        What was cut, by the parameter's name. A rank that holds a later slice of the hidden dimension has no
        ``down_bias``: the first one's is enough in a sum.

    Raises:
        ConfigError: there are fewer experts or hidden units than ranks to divide them.
    """
    degrees = mesh.degrees
    num_experts, dim, hidden = experts.down_weight.shape
    if degrees.ep > num_experts:
        raise ConfigError(f"ep={degrees.ep} is more than num_experts={num_experts}: a rank would hold none")
    if degrees.etp > hidden:
        raise ConfigError(f"etp={degrees.etp} is more than hidden_dim={hidden}: a rank would hold none")
    own = slice(*_part(num_experts, degrees.ep, mesh.rank_on("ep")))
    first, end = _part(hidden, degrees.etp, mesh.rank_on("etp"))
    gates = experts.up_weight.shape[1] // hidden
    up_rows = [slice(first + half * hidden, end + half * hidden) for half in range(gates)]
    axes = tuple(axis for axis in ("ep", "etp") if getattr(degrees, axis) > 1)
    everything = slice(0, dim)
    pieces: dict[str, list[tuple[slice, ...]]] = {
        "up_weight": [(own, rows, everything) for rows in up_rows],
        "down_weight": [(own, everything, slice(first, end))],
        "up_bias": [(own, rows) for rows in up_rows],
        "down_bias": [(own, everything)],
    }
    shards: dict[str, Shard] = {}
    for name, parameter in list(experts.named_parameters()):
        if name == "down_bias" and mesh.rank_on("etp") > 0:
            experts.down_bias = None
            continue
        shard = Shard(tuple(parameter.shape), tuple(pieces[name]), 1, axes)
        shards[name] = shard
        with torch.no_grad():
            part = shard.cut(parameter).contiguous()
        setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return shards


def _part(size: int, ranks: int, rank: int) -> tuple[int, int]:
    return even_bounds(size, ranks)[rank], even_bounds(size, ranks)[rank + 1]
