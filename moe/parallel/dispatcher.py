"""Experts on other ranks: each token goes once to every rank that holds one of its experts.

Example, E=4, two ranks with experts 0-1 and 2-3, ``expert_ids = [[0, 2], [1, 0], [3, -1]]`` here::

    destinations = [[0, 1], [0, -1], [1, -1]]      # ranks, each once, ascending
    rows sent    = token 0, token 1 | token 0, token 2
    ids sent     = [0, -1], [1, 0]  | [-1, 0], [1, -1]   # local to the destination, -1 for experts elsewhere

Four rows travel where one for each assignment would be five; and one partial row comes back for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import final

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.config import require_positive_integer
from moe.dispatch import Experts
from moe.errors import ConfigError
from moe.kernels.gather import gather_rows
from moe.kernels.plan import make_plan
from moe.parallel.collectives import all_gather
from moe.parallel.consistency import describe_call, require_same_call
from moe.parallel.exchange import Transfer, arrive, depart, scale_gradient, sum_rows
from moe.parallel.rounds import Round, count_rounds, plan_rounds
from moe.types import Plan, Routing


@final
@dataclass(frozen=True)
class ExpertParallel:
    """A dispatcher over the ranks of a group that together hold all experts.

    The host waits for the device once a call, for how many rows each rank sends: buffers and splits depend on it. All
    ranks of the group call it equally often, with or without tokens. Whether the experts' parameters need a gradient
    must be the same on all ranks; tokens may need one on some ranks only, and all take part in backward then.

    Attributes:
        group: ranks in the order of their experts; with ``copies`` > 1, that many ranks hold slices of the same experts
            and stand side by side.
        bounds: ``(ranks / copies + 1,)``, ascending from 0 to E: which experts each of them holds.
        copies: ranks that each compute a slice of the hidden dimension of the same experts; their partial outputs are
            summed like any others.
        gradient_scale: factor on the experts' gradients, and on no other; see ``moe.parallel.parallelize``.
        chunks: rounds at least; with more than one, a round travels while another is computed.
        max_received_tokens: rows that this rank receives in one round at most; where more come they go in further
            rounds, one at a time, and backward computes each again instead of keeping it. None for no limit. A sender
            keeps a copy of each row that it sends until backward.
        together: ranks that must all go the same number of rounds, because the experts of one reach others of them:
            several groups like this one, the n-th ranks of each side by side. None: just the group.

    Raises:
        ConfigError: chunks is not positive, or the limit is below the ranks of the group.
    """

    group: dist.ProcessGroup
    bounds: tuple[int, ...]
    copies: int = 1
    gradient_scale: float = 1.0
    chunks: int = 1
    max_received_tokens: int | None = None
    together: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        require_positive_integer(chunks=self.chunks)
        limit, ranks = self.max_received_tokens, self.group.size()
        assert len(self.bounds) == ranks // self.copies + 1
        if limit is not None:
            require_positive_integer(max_received_tokens=limit)
            if limit < ranks:
                raise ConfigError(
                    f"max_received_tokens={limit} must be at least {ranks}, a row from each rank of the exchange"
                )

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The sum of each token's experts, wherever they are.

        Raises:
            ParallelError: ranks of the group call it with other dtypes, sizes or grad modes.
        """
        if self.group.size() == 1:
            return self._experts_here(experts, x, routing)
        ranks = destinations(routing.expert_ids, self.bounds, self.copies)
        by_rank = make_plan(ranks, self.group.size())
        rounds, needs_gradient = self._agree(by_rank.expert_offsets.diff(), x, routing.weights)
        if needs_gradient and not (x.requires_grad or routing.weights.requires_grad):
            # Others wait in backward for the rows of this rank, so it makes the same nodes as they do.
            x = x.detach().requires_grad_()
        plan = reorder(by_rank, rounds)
        rows = gather_rows(x, plan)
        ids, weights = self._concerning(ranks.flatten()[plan.assignments] // self.copies, plan, routing)
        sizes = [sum(each.sent) for each in rounds]
        parts = list(zip(rounds, rows.split(sizes), ids.split(sizes), weights.split(sizes)))
        bounded = len(rounds) > self.chunks
        returned = self._one_by_one(experts, parts) if bounded else self._overlapped(experts, parts)
        return sum_rows(returned[0] if len(returned) == 1 else torch.cat(returned), plan)

    def _agree(self, sent: Int[Tensor, " G"], x: Tensor, weights: Tensor) -> tuple[list[Round], bool]:
        """Tell each other how many rows go where: the rounds, and whether any rank needs a gradient of its tokens."""
        size, everyone = self.group.size(), self.together or self.group
        call = torch.tensor(describe_call(x, weights), dtype=torch.int32)
        told = all_gather(torch.cat([sent, call.to(sent.device, non_blocking=True)]), everyone)
        table = told.view(everyone.size(), -1).cpu().numpy().astype(np.int64)  # here the host waits
        needs_gradient = require_same_call(table[:, size:])
        groups = everyone.size() // size
        counts = table[:, :size].reshape(size, groups, size)
        rounds = max(count_rounds(counts[:, n], self.chunks, self.max_received_tokens) for n in range(groups))
        return plan_rounds(counts[:, everyone.rank() % groups], self.group.rank(), rounds), needs_gradient

    def _concerning(self, holders: Int[Tensor, " S"], plan: Plan, routing: Routing) -> tuple[Tensor, Tensor]:
        """For each row, the ids and weights that its destination needs, best first: ``(S, k)`` each.

        No destination can need more than it holds experts, so k is the largest number of these, or K where that is
        less: the plan and the buffers of the experts' operation are as wide.
        """
        top_k = routing.expert_ids.shape[1]
        width = min(top_k, max(end - first for first, end in pairwise(self.bounds)))
        bounds = torch.tensor(self.bounds, dtype=torch.int32).to(holders.device, non_blocking=True)
        first, end = bounds[holders, None], bounds[holders + 1, None]
        slots = (plan.assignments // plan.rows.shape[1] * top_k)[:, None] + torch.arange(top_k, device=holders.device)
        ids = routing.expert_ids.flatten()[slots]
        if width < top_k:
            is_elsewhere = (ids < first) | (ids >= end)
            slots = slots.gather(1, is_elsewhere.byte().sort(dim=1, stable=True).indices[:, :width])
            ids = routing.expert_ids.flatten()[slots]
        is_there = (ids >= first) & (ids < end)
        return (ids - first).where(is_there, -1), routing.weights.flatten()[slots].where(is_there, 0.0)

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
        return transfer, depart(
            transfer, rows, torch.cat([ids.to(_BITS[weights.dtype]).view(weights.dtype), weights], 1)
        )

    def _compute(self, experts: Experts, flight: "_Flight") -> "_Flight":
        """Wait for a round, compute it and send the outputs back."""
        transfer, tensors = flight
        rows, described = arrive(transfer, *tensors)
        bits, weights = described.chunk(2, dim=1)
        ids = bits.detach().contiguous().view(_BITS[weights.dtype]).int()
        nothing = weights.new_empty(len(ids), 0)  # scores and logits stay with the router
        y = self._experts_here(experts, rows, Routing(ids, weights, nothing, nothing))
        back = Transfer(self.group, transfer.received, transfer.sent)
        return back, depart(back, y)

    def _experts_here(self, experts: Experts, x: Tensor, routing: Routing) -> Tensor:
        """This rank's experts, their gradients scaled and nobody else's."""
        x, weights = (scale_gradient(tensor, 1 / self.gradient_scale) for tensor in (x, routing.weights))
        return scale_gradient(experts(x, replace(routing, weights=weights)), self.gradient_scale)


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
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
    ends = torch.tensor(bounds[1:], dtype=torch.int32).to(expert_ids.device, non_blocking=True)
    holders = torch.bucketize(expert_ids, ends, right=True, out_int32=True)
    holders = holders.where(expert_ids >= 0, num_ranks).sort(dim=1).values
    repeated = torch.zeros_like(holders, dtype=torch.bool)
    repeated[:, 1:] = holders[:, 1:] == holders[:, :-1]
    holders = holders.where(~repeated & (holders < num_ranks), -1)
    if copies == 1:
        return holders
    ranks = holders[:, :, None] * copies + torch.arange(copies, dtype=torch.int32, device=holders.device)
    return ranks.where(holders[:, :, None] >= 0, -1).flatten(1)


def reorder(plan: Plan, rounds: Sequence[Round]) -> Plan:
    """The plan of the rows that are sent, by round and then by destination.

    Args:
        plan: by destination; rows without one come last.
        rounds: as this rank sees them.
    """
    sent = np.array([each.sent for each in rounds])
    total = int(sent.sum())
    if len(rounds) == 1 or total == 0:
        return Plan(plan.assignments[:total], plan.expert_offsets, plan.rows)
    device = plan.rows.device
    starts = np.cumsum(sent.sum(0)) - sent.sum(0) + np.array([each.first for each in rounds])
    ends_after = sent.cumsum().reshape(sent.shape)
    # A piece is what one round has for one destination; its rows move together.
    moved, sizes = (
        torch.from_numpy(numbers.ravel()).to(device, non_blocking=True)
        for numbers in (starts - ends_after + sent, sent)
    )
    here = torch.arange(total, device=device)
    order = here + moved.repeat_interleave(sizes, output_size=total)
    place = here.new_empty(total, dtype=torch.int32)
    place[order] = here.int()
    rows = plan.rows.where(plan.rows < 0, place[plan.rows.clamp(min=0).long()])
    return Plan(plan.assignments[order], plan.expert_offsets, rows)
