"""Expert parallelism as the common stacks do it: one copy of a token for each of its experts.

Example, E=4, two ranks with experts 0-1 and 2-3, ``expert_ids = [[0, 2], [1, 0], [3, -1]]``: tokens 0, 1, 1 go to the
first rank and 0, 2 to the second, in the order of their experts, with how many rows each expert gets.

The permutation, the exchange, the experts and the weighted sum are the library's own functions, so that nothing but the
way tokens travel is compared.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch import Experts
from moe.kernels.combine import combine_rows
from moe.kernels.gather import gather_rows
from moe.kernels.plan import make_plan
from moe.parallel.exchange import Transfer, arrive, depart
from moe.types import Routing


@final
@dataclass(frozen=True)
class OneCopyAnExpert:
    """A dispatcher over the ranks of a group that together hold all experts.

    Attributes:
        group: ranks in the order of their experts.
        bounds: ``(ranks + 1,)``, ascending from 0 to E: which experts each of them holds.
    """

    group: dist.ProcessGroup
    bounds: tuple[int, ...]

    def run(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """Sort tokens by expert, send them, run the experts, send the rows back, sum by weight where they came from."""
        plan = make_plan(routing.expert_ids, self.bounds[-1])
        to_experts = plan.expert_offsets.diff()
        from_ranks = self._exchange_counts(to_experts)
        held = [end - start for start, end in zip(self.bounds, self.bounds[1:])]
        sent = [int(counts.sum()) for counts in to_experts.split(held)]
        there = Transfer(self.group, sent, from_ranks.sum(1).tolist())
        (rows,) = arrive(there, *depart(there, gather_rows(x, plan)[: sum(sent)]))
        y = experts(rows, _each_to_one(from_ranks, routing.weights))
        back = Transfer(self.group, there.received, there.sent)
        (returned,) = arrive(back, *depart(back, y))
        # The operation wants a row for every assignment; those of no expert come last, and none is read.
        none = plan.assignments.shape[0] - sum(sent)
        returned = torch.cat([returned, returned.new_zeros(none, returned.shape[1])]) if none else returned
        return combine_rows(returned, routing.weights, plan)

    def _exchange_counts(self, to_experts: Tensor) -> Tensor:
        """``(ranks, experts here)``; the rows that come from each rank for each expert."""
        size, rank = self.group.size(), self.group.rank()
        held = [end - start for start, end in zip(self.bounds, self.bounds[1:])]
        from_ranks = to_experts.new_empty(size, held[rank])
        dist.all_to_all_single(from_ranks.view(-1), to_experts, [held[rank]] * size, held, group=self.group)
        return from_ranks


def _each_to_one(from_ranks: Tensor, weights: Tensor) -> Routing:
    """Rows as they come, by rank and then by expert: each to its one expert, with weight 1."""
    ranks, held = from_ranks.shape
    ids = torch.arange(held, dtype=torch.int32).repeat(ranks).repeat_interleave(from_ranks.view(-1))[:, None]
    nothing = weights.new_empty(len(ids), 0)
    return Routing(ids, weights.new_ones(len(ids), 1), nothing, nothing)
