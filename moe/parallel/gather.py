"""Whole parameters out of what the ranks hold: for comparisons and checks, one parameter at a time, on rank 0."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe.parallel.experts import Shard
from moe.parallel.parallelize import Parallel


@final
@dataclass(frozen=True)
class Whole:
    """A parameter, or something of its shape, put together from all ranks."""

    name: str
    tensor: Tensor
    """On the CPU."""
    disagreement: float
    """The largest difference between two ranks that hold the same part; 0 where they agree to the last bit, NaN where
    one has a NaN."""


def gather(parallel: Parallel, of: Callable[[Tensor], Tensor | None]) -> Iterator[Whole]:
    """Put tensors together; collective, every rank iterates to the end.

    Args:
        parallel: the model that is spread.
        of: from a parameter to itself, to its gradient, or to anything laid out alike; None for nothing.

    Yields:
        On rank 0, by the order of names; nothing elsewhere.
    """
    own = dict(parallel.named_parameters())
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, list(own))
    for name in sorted({name for theirs in names for name in theirs}):
        held = of(own[name]) if name in own else None
        part = None if held is None else _unsharded(held.detach()).cpu()
        parts: list[tuple[Shard, Tensor] | None] | None = None
        if dist.get_rank() == 0:
            parts = [None] * dist.get_world_size()
        dist.gather_object(None if part is None else (parallel.shards[name], part), parts)
        present = [each for each in parts or () if each is not None]
        if present:
            yield _put_together(name, present)


def _put_together(name: str, parts: list[tuple[Shard, Tensor]]) -> Whole:
    first, tensor = parts[0]
    whole, known = torch.zeros(first.shape, dtype=tensor.dtype), torch.zeros(first.shape, dtype=torch.bool)
    disagreement = torch.zeros((), dtype=tensor.dtype)
    for shard, part in parts:
        difference = (part - shard.cut(whole))[shard.cut(known)].abs()
        if difference.numel():
            disagreement = torch.maximum(disagreement, difference.max())  # a NaN stays one
        shard.paste(part, whole)
        shard.paste(torch.ones_like(part, dtype=torch.bool), known)
    return Whole(name, whole, disagreement.item())


def _unsharded(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
