"""Expert loads summed over the ranks that see different data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist

from moe.monitor import LoadStats


@final
@dataclass(frozen=True)
class PoolLoads:
    """Adds up the loads of all data ranks: exact counts, the same on every rank, one all-reduce for all layers.

    Attributes:
        group: ranks that see different data.
    """

    group: dist.ProcessGroup

    def __call__(self, loads: Sequence[LoadStats]) -> list[LoadStats]:
        """The sums, in the same order; every rank calls it with the same layers."""
        # float64 is exact for counts up to 2^53, so that one tensor carries all.
        fields = [(each.tokens_per_expert, each.dropped, each.tokens, each.top_score_sum) for each in loads]
        rows = [torch.cat([field.double().view(-1) for field in row]) for row in fields]
        pooled = torch.cat(rows)
        dist.all_reduce(pooled, group=self.group)
        parts = pooled.split([len(row) for row in rows])
        return [
            LoadStats(part[:-3].long(), part[-3].long(), part[-2].long(), part[-1].to(load.top_score_sum.dtype))
            for part, load in zip(parts, loads)
        ]
