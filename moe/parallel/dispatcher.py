"""Experts on other ranks: each token goes once to every rank that holds one of its experts.

Example, E=4, two ranks with experts 0-1 and 2-3, ``expert_ids = [[0, 2], [1, 0], [3, -1]]`` here::

    destinations = [[0, 1], [0, -1], [-1, 1]]      # ranks, each once, ascending
    rows sent    = token 0, token 1 | token 0, token 2
    ids sent     = [0, -1], [1, 0]  | [-1, 0], [1, -1]   # local to the destination, -1 for experts elsewhere

Four rows travel where one for each assignment would be five; and one partial row comes back for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.dispatch import Experts
from moe.kernels.gather import gather_rows
from moe.kernels.plan import make_plan
from moe.parallel.collectives import all_gather
from moe.parallel.exchange import Transfer, arrive, depart, scale_gradient, sum_rows
from moe.parallel.rounds import Round, plan_rounds
from moe.types import Plan, Routing


@final
@dataclass(frozen=True)
class ExpertParallel:
    """A dispatcher over the ranks of a group that together hold all experts.

    The host waits for the device once a call, for how many rows each rank sends: buffers and splits depend on it.

    Attributes:
        group: ranks in the order of their experts; with ``copies`` > 1, that many ranks hold slices of the same experts
            and stand side by side.
        bounds: ``(ranks / copies + 1,)``, ascending from 0 to E: which experts each of them holds.
        copies: ranks that each compute a slice of the hidden dimension of the same experts; their partial outputs are
            summed like any others.
        gradient_scale: factor on the experts' gradients, and on no other; see ``moe.parallel.parallelize``.
        chunks: rounds at least; with more than one, a round travels while another is computed.
        max_received_tokens: rows that this rank receives in one round at most; where more come they go in further
            rounds, and backward computes each round again instead of keeping it. None for no limit.
    """

    group: dist.ProcessGroup
    bounds: tuple[int, ...]
    copies: int = 1
    gradient_scale: float = 1.0
    chunks: int = 1
    max_received_tokens: int | None = None

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The sum of each token's experts, wherever they are."""
        plan, rounds = self._plan(routing.expert_ids)
        rows = gather_rows(x, plan)
        ids, weights = self._concerning(plan, rounds, routing)
        sizes = [sum(each.sent) for each in rounds]
        parts = list(zip(rounds, rows.split(sizes), ids.split(sizes), weights.split(sizes)))
        bounded = len(rounds) > self.chunks and torch.is_grad_enabled()
        returned = self._one_by_one(experts, parts) if bounded else self._overlapped(experts, parts)
        return sum_rows(returned[0] if len(returned) == 1 else torch.cat(returned), plan)

    def _plan(self, expert_ids: Int[Tensor, "T K"]) -> tuple[Plan, list[Round]]:
        """The rows to send, by round and then by destination, and how many to whom in each round."""
        size, rank = self.group.size(), self.group.rank()
        plan = make_plan(destinations(expert_ids, self.bounds, self.copies), size)
        counts = all_gather(plan.expert_offsets.diff(), self.group)
        table = counts.cpu().view(size, size).numpy().astype(np.int64)
        rounds = plan_rounds(table, rank, self.chunks, self.max_received_tokens)
        return reorder(plan, table[rank], rounds), rounds

    def _concerning(self, plan: Plan, rounds: Sequence[Round], routing: Routing) -> tuple[Tensor, Tensor]:
        """For each row, the ids and weights that its destination needs: ``(S, K)`` each."""
        slots = self.group.size() // self.copies
        ranks = torch.tensor([d // self.copies for each in rounds for d in range(len(each.sent))])
        sizes = torch.tensor([size for each in rounds for size in each.sent])
        holder = ranks.repeat_interleave(sizes).to(routing.expert_ids.device)
        bounds = torch.tensor(self.bounds, dtype=torch.int32).to(routing.expert_ids.device)
        assert len(self.bounds) == slots + 1
        token = plan.assignments // plan.rows.shape[1]
        ids = routing.expert_ids[token]
        is_there = (ids >= bounds[holder, None]) & (ids < bounds[holder + 1, None])
        weights = routing.weights[token].where(is_there, 0.0)
        return (ids - bounds[holder, None]).where(is_there, -1), weights

    def _overlapped(self, experts: Experts, parts: Sequence["_Part"]) -> list[Tensor]:
        """All rounds, each on its way while the one before it is computed."""
        outgoing = self._send(*parts[0])
        returning = []
        for place in range(len(parts)):
            following = self._send(*parts[place + 1]) if place + 1 < len(parts) else None
            returning.append(self._compute(experts, outgoing))
            if following is not None:
                outgoing = following
        return [arrive(transfer, *rows)[0] for transfer, rows in returning]

    def _one_by_one(self, experts: Experts, parts: Sequence["_Part"]) -> list[Tensor]:
        """Each round by itself, in forward and again in backward, so that one is in memory at a time."""

        def go(each: Round, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            transfer, returned = self._compute(experts, self._send(each, rows, ids, weights))
            return arrive(transfer, *returned)[0]

        return [checkpoint(go, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]

    def _send(self, each: Round, rows: Tensor, ids: Tensor, weights: Tensor) -> "_Flight":
        transfer = Transfer(self.group, each.sent, each.received)
        # One small tensor: an id is a number of the weights' dtype by its bits.
        as_weights = ids.to(torch.int32 if weights.dtype == torch.float32 else torch.int64).view(weights.dtype)
        return transfer, depart(transfer, rows, torch.cat([as_weights, weights], 1))

    def _compute(self, experts: Experts, flight: "_Flight") -> "_Flight":
        """Wait for a round, compute it and send the outputs back."""
        transfer, tensors = flight
        rows, described = arrive(transfer, *tensors)
        bits, weights = described.chunk(2, dim=1)
        ids = bits.detach().contiguous().view(torch.int32 if weights.dtype == torch.float32 else torch.int64).int()
        # The experts' gradients are scaled between these two lines, and nobody else's.
        rows, weights = (scale_gradient(tensor, 1 / self.gradient_scale) for tensor in (rows, weights))
        y = scale_gradient(experts(rows, _routing_here(ids, weights)), self.gradient_scale)
        back = Transfer(self.group, transfer.received, transfer.sent)
        return back, depart(back, y)


_Part = tuple[Round, Tensor, Tensor, Tensor]
_Flight = tuple[Transfer, tuple[Tensor, ...]]


def even_bounds(num_experts: int, ranks: int) -> tuple[int, ...]:
    """Consecutive experts for each rank, as evenly as they go: 5 over 2 are ``(0, 2, 5)``."""
    return tuple(num_experts * rank // ranks for rank in range(ranks + 1))


def destinations(expert_ids: Int[Tensor, "T K"], bounds: Sequence[int], copies: int) -> Int[Tensor, "T L"]:
    """The ranks that hold a token's experts, ascending, each once; -1 fills up.

    Args:
        expert_ids: int32, -1 for none.
        bounds: see :class:`ExpertParallel`.
        copies: likewise; a token goes to all of them.

    Returns:
        ``(T, K * copies)`` int32.
    """
    num_ranks = len(bounds) - 1
    ends = torch.tensor(bounds[1:], dtype=torch.int32).to(expert_ids.device)
    holders = torch.bucketize(expert_ids, ends, right=True, out_int32=True)
    holders = holders.where(expert_ids >= 0, num_ranks).sort(dim=1).values
    repeated = torch.zeros_like(holders, dtype=torch.bool)
    repeated[:, 1:] = holders[:, 1:] == holders[:, :-1]
    holders = holders.where(~repeated & (holders < num_ranks), -1)
    if copies == 1:
        return holders
    ranks = holders[:, :, None] * copies + torch.arange(copies, dtype=torch.int32, device=holders.device)
    return ranks.where(holders[:, :, None] >= 0, -1).flatten(1)


def reorder(plan: Plan, counts: Sequence[int], rounds: Sequence[Round]) -> Plan:
    """The plan of the rows that are sent, by round and then by destination.

    Args:
        plan: by destination; rows without one come last.
        counts: rows for each destination.
        rounds: as this rank sees them.
    """
    total = int(sum(counts))
    if len(rounds) == 1:
        return Plan(plan.assignments[:total], plan.expert_offsets, plan.rows)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    pieces = [np.arange(s + f, s + f + n) for each in rounds for s, f, n in zip(starts, each.first, each.sent)]
    order = torch.from_numpy(np.concatenate(pieces)).to(plan.rows.device)
    place = torch.empty_like(order, dtype=torch.int32)
    place[order] = torch.arange(total, dtype=torch.int32, device=order.device)
    rows = plan.rows.where(plan.rows < 0, place[plan.rows.clamp(min=0).long()]) if total else plan.rows
    return Plan(plan.assignments[order], plan.expert_offsets, rows)


def _routing_here(ids: Int[Tensor, "R K"], weights: Float[Tensor, "R K"]) -> Routing:
    """What the experts need of a decision; its scores stay with the router."""
    nothing = weights.new_empty(len(ids), 0)
    return Routing(ids, weights, nothing, nothing)
