"""Which rows go where, and what is told about them: against plain Python."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.kernels.plan import make_plan
from moe.parallel.dispatcher import ExpertParallel, destinations, even_bounds, reorder
from moe.parallel.rounds import plan_rounds
from moe.types import Plan, Routing


@st.composite
def decisions(draw: st.DrawFn) -> tuple[list[list[int]], tuple[int, ...], int]:
    """Distinct experts or none for each token, who holds which, and copies."""
    ranks, copies = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(1, 3), min_size=ranks, max_size=ranks))
    bounds = tuple(sum(sizes[:rank]) for rank in range(ranks + 1))
    top_k = draw(st.integers(1, min(4, bounds[-1])))
    token = st.permutations(range(bounds[-1])).map(lambda order: order[:top_k])
    dropped = st.lists(st.booleans(), min_size=top_k, max_size=top_k)
    tokens = draw(st.lists(st.tuples(token, dropped), max_size=6))
    return [[-1 if gone else e for e, gone in zip(*each)] for each in tokens], bounds, copies


def as_ids(tokens: list[list[int]]) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int32).view(len(tokens), -1 if tokens else 1)


def holders_of(token: list[int], bounds: tuple[int, ...]) -> list[int]:
    """By definition: every rank that holds one of the token's experts, once."""
    return [r for r in range(len(bounds) - 1) if any(bounds[r] <= e < bounds[r + 1] for e in token)]


@given(decisions())
def test_each_rank_once_in_ascending_order(decision: tuple[list[list[int]], tuple[int, ...], int]) -> None:
    tokens, bounds, copies = decision
    found = destinations(as_ids(tokens), bounds, copies)
    assert found.dtype == torch.int32
    for token, row in zip(tokens, found.tolist(), strict=True):
        ranks = [holder * copies + copy for holder in holders_of(token, bounds) for copy in range(copies)]
        assert [rank for rank in row if rank >= 0] == ranks


def test_documented_example() -> None:
    ids = torch.tensor([[0, 2], [1, 0], [3, -1]], dtype=torch.int32)
    assert destinations(ids, (0, 2, 4), 1).tolist() == [[0, 1], [0, -1], [1, -1]]
    plan, described = described_rows(ids, (0, 2, 4), 1, 1)
    assert (plan.assignments // 2).tolist() == [0, 1, 0, 2]
    assert described[0].tolist() == [[0, -1], [1, 0], [-1, 0], [1, -1]]


def described_rows(ids: torch.Tensor, bounds: tuple[int, ...], copies: int, rounds: int) -> tuple[Plan, Any]:
    """The plan of rank 0 and what it tells about each row; others have nothing to send."""
    ranks = (len(bounds) - 1) * copies
    to = destinations(ids, bounds, copies)
    by_rank = make_plan(to, ranks)
    counts = torch.zeros(ranks, ranks, dtype=torch.int64)
    counts[0] = by_rank.expert_offsets.diff()
    plan = reorder(by_rank, plan_rounds(counts.numpy(), 0, rounds))
    group: Any = SimpleNamespace(size=lambda: ranks)
    weights = ids.double() + 10
    nothing = weights.new_empty(len(ids), 0)
    dispatcher = object.__new__(ExpertParallel)  # no process group: what is tested asks it nothing
    object.__setattr__(dispatcher, "group", group)
    object.__setattr__(dispatcher, "bounds", bounds)
    holders = to.flatten()[plan.assignments] // copies
    return plan, dispatcher._concerning(holders, plan, Routing(ids, weights, nothing, nothing))


@given(decisions(), st.integers(1, 3))
def test_rows_by_round_and_what_is_told(decision: tuple[list[list[int]], tuple[int, ...], int], rounds: int) -> None:
    tokens, bounds, copies = decision
    ids = as_ids(tokens)
    plan, (there, weights) = described_rows(ids, bounds, copies, rounds)
    # By definition: for each destination its tokens in order, cut into rounds; then all of one round, by destination.
    wanted = []
    for rank in range((len(bounds) - 1) * copies):
        mine = [t for t, token in enumerate(tokens) if rank // copies in holders_of(token, bounds)]
        cuts = [len(mine) * each // rounds for each in range(rounds + 1)]
        wanted += [(each, rank, t) for each in range(rounds) for t in mine[cuts[each] : cuts[each + 1]]]
    wanted.sort(key=lambda each: each[:2])  # stable: tokens stay in order
    assert (plan.assignments // plan.rows.shape[1]).tolist() == [t for _, _, t in wanted]
    for (_, rank, t), row_ids, row_weights in zip(wanted, there.tolist(), weights.tolist(), strict=True):
        first, end = bounds[rank // copies], bounds[rank // copies + 1]
        mine = [e - first for e in tokens[t] if first <= e < end]
        assert [e for e in row_ids if e >= 0] == mine  # best first
        assert [w for w in row_weights if w] == [e + first + 10 for e in mine]
        assert len(row_ids) == min(ids.shape[1], max(b - a for a, b in pairwise(bounds)))
    # The way back: a token's rows, in the order of ranks.
    for t, row in enumerate(plan.rows.tolist()):
        rows = [r for r in row if r >= 0]
        assert [wanted[r][2] for r in rows] == [t] * len(rows)
        assert [wanted[r][1] for r in rows] == sorted({rank for _, rank, token in wanted if token == t})


def test_even_bounds() -> None:
    assert even_bounds(5, 2) == (0, 2, 5)
    assert even_bounds(8, 4) == (0, 2, 4, 6, 8)
