"""Counts summed over the ranks that see different data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from moe.layer import moe_layers


@final
@dataclass(frozen=True)
class PoolCounts:
    """Adds up counts of all data ranks: exact, the same on every rank, one all-reduce for all tensors.

    Attributes:
        group: ranks that see different data.
    """

    group: dist.ProcessGroup

    @property
    def ranks(self) -> int:
        """How many see different data."""
        return self.group.size()

    def __call__(self, counts: Sequence[Int[Tensor, "..."]]) -> list[Tensor]:
        """The sums of int64 tensors, in the same order; every rank calls it with tensors of the same shapes."""
        pooled = torch.cat([each.reshape(-1) for each in counts])
        dist.all_reduce(pooled, group=self.group)
        parts = pooled.split([each.numel() for each in counts])
        return [part.view(each.shape) for part, each in zip(parts, counts)]


def share_counts(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Have all MoE layers of a model balance by the tokens of all ranks of a group, in place.

    For a model that another library spreads (``DistributedDataParallel``, a Trainer): each rank then moves its biases,
    takes its losses over a step and reports by the same counts. `moe.parallelize` does so itself.

    Args:
        model: the same on all ranks, each of which sees other tokens.
        group: ``torch.distributed.group.WORLD`` mostly. Every rank calls ``moe.balance_step`` equally often.
    """
    for _, layer in moe_layers(model):
        layer.pool_counts = PoolCounts(group)
