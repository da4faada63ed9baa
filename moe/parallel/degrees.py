"""How many ways a model is spread, along which axes; pure arithmetic, no process needed.

Every rank has two addresses. For what is dense (attention, embeddings, routers) it is ``(pp, dp_replicate, dp_shard,
tp)``; for routed experts it is ``(pp, edp_replicate, edp_shard, ep, etp)``, and the two need not follow each other
(parallel folding, Liu et al. 2025, arXiv 2504.14960): within a pipeline stage, the ``dp_replicate * dp_shard * tp``
ranks are simply divided a second time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, final

from moe.config import require_positive_integer
from moe.errors import ConfigError

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "tp")
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "etp")


@final
@dataclass(frozen=True)
class Degrees:
    """The size of each axis.

    Raises:
        ConfigError: a degree is not a positive whole number, or experts cannot be divided as asked.
    """

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Groups of ranks that hold the same parameters and see different data."""
    dp_shard: int = 1
    """Ranks that see different data and share the parameters among them."""
    tp: int = 1
    """Ranks that see the same data and divide heads and hidden dimensions of dense blocks."""
    ep: int = 1
    """Ranks that divide the routed experts."""
    etp: int = 1
    """Ranks that divide the hidden dimension of each routed expert."""

    def __post_init__(self) -> None:
        require_positive_integer(**{field.name: getattr(self, field.name) for field in fields(self)})
        held, within, ranks = self.ep * self.etp, self.dp_shard * self.tp, self.dp * self.tp
        # A copy of all experts lies within a replica, or takes whole replicas: else edp would have no rectangle.
        if within % held != 0 and (ranks % held != 0 or held % within != 0):
            raise ConfigError(
                f"ep={self.ep} * etp={self.etp} = {held} ranks hold all experts once; that must divide dp_shard="
                f"{self.dp_shard} * tp={self.tp} = {within}, or be a multiple of it that divides "
                f"dp_replicate={self.dp_replicate} * {within} = {ranks}"
            )

    @property
    def dp(self) -> int:
        """Ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp * self.tp

    @property
    def edp_shard(self) -> int:
        """Ranks that hold the same experts and share their parameters among them."""
        return max(1, self.dp_shard * self.tp // (self.ep * self.etp))

    @property
    def edp_replicate(self) -> int:
        """Groups of ranks that hold the same experts whole."""
        return self.dp * self.tp // (self.ep * self.etp * self.edp_shard)

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.edp_replicate * self.edp_shard

    @property
    def dense_shape(self) -> dict[str, int]:
        """The sizes of ``DENSE_AXES``."""
        return {axis: getattr(self, axis) for axis in DENSE_AXES}

    @property
    def expert_shape(self) -> dict[str, int]:
        """The sizes of ``EXPERT_AXES``."""
        return {axis: getattr(self, axis) for axis in EXPERT_AXES}

    @classmethod
    def parse(cls, spec: str | Mapping[str, Any], world_size: int | None = None) -> "Degrees":
        """Read ``"ep=2,tp=2"`` or the same as a mapping.

        A ``dp_shard`` that is not given is what the others leave of ``world_size``; without a world size, the smallest
        multiple of ``ep`` that the experts fit in.

        Raises:
            ConfigError: an unknown axis, one that is given twice, a value that is no number, or degrees that do not
                multiply to world_size.
        """
        given = _read(spec)
        if "dp_shard" not in given:
            rest = {axis: given.get(axis, 1) for axis in ("pp", "dp_replicate", "tp", "ep", "etp")}
            require_positive_integer(**rest)
            given["dp_shard"] = _rest(rest, world_size)
        degrees = cls(**given)
        if world_size is not None and degrees.world_size != world_size:
            shape = " * ".join(f"{axis}={size}" for axis, size in degrees.dense_shape.items())
            raise ConfigError(f"{shape} = {degrees.world_size} ranks, but there are {world_size}")
        return degrees

    def __str__(self) -> str:
        named = [f"{field.name}={getattr(self, field.name)}" for field in fields(self) if getattr(self, field.name) > 1]
        return ",".join(named) or "one rank"


def spans_nodes(degrees: Degrees, node_size: int) -> bool:
    """Whether the ranks that hold all experts once are on several nodes.

    Args:
        degrees: of all ranks.
        node_size: consecutive ranks that share a node.

    Raises:
        ConfigError: nodes and these ranks do not divide each other.
    """
    require_positive_integer(node_size=node_size)
    held = degrees.ep * degrees.etp
    # On one node, several copies of all experts may be; on several, one copy takes whole nodes, and an expert one.
    if node_size % held and (held % node_size or node_size % degrees.etp):
        raise ConfigError(
            f"node_size={node_size} must be a multiple of ep={degrees.ep} * etp={degrees.etp} = {held} ranks that hold "
            "all experts once, or divide them and be a multiple of etp"
        )
    return held > node_size


def coordinates(rank: int, shape: Mapping[str, int]) -> dict[str, int]:
    """The address of a rank on a mesh whose last axis varies fastest."""
    address = {}
    for axis, size in reversed(list(shape.items())):
        rank, address[axis] = divmod(rank, size)
    return {axis: address[axis] for axis in shape}


def rank_table(degrees: Degrees) -> str:
    """Every rank with both its addresses, one a line."""
    shapes = (degrees.dense_shape, degrees.expert_shape)
    names = [*DENSE_AXES, *EXPERT_AXES[1:]]
    rows = [["rank", *names]]
    for rank in range(degrees.world_size):
        dense, expert = (coordinates(rank, shape) for shape in shapes)
        rows.append([str(number) for number in (rank, *({**dense, **expert}[name] for name in names))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def _read(spec: str | Mapping[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(Degrees)]
    if isinstance(spec, str):
        pairs = [[word.strip() for word in part.partition("=")] for part in spec.split(",") if part.strip()]
        named = [axis for axis, _, _ in pairs]
        for axis in named:
            if named.count(axis) > 1:
                raise ConfigError(f"{axis} is given twice in {spec!r}")
        spec = {axis: int(value) if value.isdecimal() else value for axis, _, value in pairs}
    for axis, value in spec.items():
        if axis not in known:
            raise ConfigError(f"{axis}={value!r} is no axis; choose from {', '.join(known)}")
    return dict(spec)


def _rest(given: Mapping[str, int], world_size: int | None) -> int:
    """The ``dp_shard`` that was left open."""
    tp, held = given["tp"], given["ep"] * given["etp"]
    if world_size is None:
        least = held // gcd(held, tp)
        return least * given["ep"] // gcd(least, given["ep"])
    others = given["pp"] * given["dp_replicate"] * tp
    if world_size % others:
        raise ConfigError(
            f"pp={given['pp']} * dp_replicate={given['dp_replicate']} * tp={tp} = {others} does not divide the "
            f"{world_size} ranks there are"
        )
    return world_size // others
