"""What a rank sends, counted where PyTorch calls a collective."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@final
@dataclass
class Sent:
    """Bytes of one kind."""

    everywhere: int = 0
    """What a rank sends to itself included."""
    elsewhere: int = 0
    """To other ranks."""


KINDS = ("rows", "ids and weights", "counts")


@final
class Traffic(TorchDispatchMode):
    """Counts, while it is active, the bytes that this rank sends to each kind's purpose; backward passes included.

    Args:
        dim: width of a token, which tells rows from what describes them; whole numbers alone are counts.

    Attributes:
        sent: by kind of ``KINDS``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.sent: dict[str, Sent] = {kind: Sent() for kind in KINDS}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name not in _TO_EACH:
            raise LookupError(f"{name} is a collective that nobody counts here; choose from {list(_TO_EACH)}")
        to_each = _TO_EACH[name](args)
        sent = self.sent[self._kind(args[1])]
        sent.everywhere += sum(to_each)
        sent.elsewhere += sum(to_each) - to_each[dist.get_rank()]

    def _kind(self, tensor: Tensor) -> str:
        if not tensor.is_floating_point():
            return "counts"
        return "rows" if tensor.shape[-1] == self.dim else "ids and weights"


def _all_to_all(args: Sequence[Any]) -> list[int]:
    """Bytes to each rank; without splits, equal parts."""
    tensor: Tensor = args[1]
    rows = args[4] or [len(tensor) // dist.get_world_size()] * dist.get_world_size()
    return [each * tensor[:1].numel() * tensor.itemsize for each in rows]


def _all_gather(args: Sequence[Any]) -> list[int]:
    """Bytes to each rank: the same to all."""
    return [args[1].nbytes] * (args[0].numel() // args[1].numel())


_TO_EACH: dict[str, Callable[[Sequence[Any]], list[int]]] = {
    "alltoall_base_": _all_to_all,
    "_allgather_base_": _all_gather,
}


def count_sent(step: Callable[[], object], dim: int) -> dict[str, Sent]:
    """What this rank sends in one call; every rank of the process group calls it.

    Args:
        step: whose collectives are all over the whole process group.
        dim: width of a token.

    Returns:
        By kind of ``KINDS``.
    """
    with Traffic(dim) as traffic:
        step()
    return traffic.sent


@final
@dataclass(frozen=True)
class Reach:
    """How far a token goes, in the mean over some tokens."""

    experts: float
    """That a token has, wherever they are."""
    ranks: float
    """That hold them, each once."""
    experts_elsewhere: float
    """On other ranks than the token."""
    ranks_elsewhere: float
    """That hold those."""

    @classmethod
    def of(cls, expert_ids: Tensor, bounds: Sequence[int], rank: int) -> "Reach":
        """Of the tokens of a rank.

        Args:
            expert_ids: ``(T, K)`` int32, -1 for none.
            bounds: ``(ranks + 1,)``, which experts each rank holds.
            rank: where the tokens are.
        """
        held = [((expert_ids >= start) & (expert_ids < end)).sum(1) for start, end in pairwise(bounds)]
        per_rank = torch.stack(held).double()
        others = torch.cat([per_rank[:rank], per_rank[rank + 1 :]])
        sums = (per_rank, per_rank > 0, others, others > 0)
        return cls(*(each.sum().item() / len(expert_ids) for each in sums))
