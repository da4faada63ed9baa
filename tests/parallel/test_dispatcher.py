"""Tokens that meet their experts on other ranks: every output and gradient against one process, nothing hangs."""

import pytest
import torch

from moe.parallel.local_ranks import run_local
from tests.support.ranks import Case, Outcome, dispatch_all, require_equal

NAMES = {
    "one rank": Case((5,)),
    "two ranks": Case((5, 7)),
    "three ranks, uneven experts": Case((4, 9, 1), num_experts=7, top_k=3),
    "four ranks": Case((4, 3, 6, 5), num_experts=8, top_k=4),
    "more choices than ranks": Case((6, 5), top_k=5),
    "more choices than experts on a rank": Case((6, 5, 4), num_experts=4, top_k=3),
    "no tokens on a rank": Case((0, 6)),
    "no tokens anywhere": Case((0, 0)),
    "no tokens on a rank, chunks": Case((6, 0, 3), chunks=3),
    "nothing for odd experts": Case((6, 5), chosen="even"),
    "nothing for the second rank": Case((6, 5), chosen="first"),
    "dropped assignments": Case((9, 8), chosen="few"),
    "chunks of two": Case((9, 8), chunks=2),
    "chunks of three": Case((9, 8, 7), chunks=3),
    "chunks of four, fewer rows": Case((2, 1, 1, 3), chunks=4),
    "copies": Case((5, 6), copies=2),
    "two holders of two copies, chunks": Case((5, 6, 2, 3), copies=2, chunks=2),
    "all to one expert, limit": Case((9, 8, 10), chosen="first", limit=3),
    "limit": Case((9, 8), limit=4),
    "limit and chunks": Case((9, 8), limit=5, chunks=2),
    "limit, no tokens on a rank": Case((9, 0), limit=2),
    "float32": Case((9, 8), dtype=torch.float32),
    "float32, limit": Case((9, 8), dtype=torch.float32, limit=4),
    "bfloat16": Case((9, 8), dtype=torch.bfloat16),
    "strided": Case((9, 8), strided=True),
    "without gradients": Case((9, 8), backward="none"),
    "without gradients, limit": Case((9, 8), backward="none", limit=4),
    "backward twice": Case((9, 8), backward="twice", chunks=2),
    "frozen experts": Case((5, 6), frozen=("experts",)),
    "frozen router": Case((5, 6), frozen=("weights",)),
    "frozen tokens": Case((5, 6), frozen=("x",)),
    "only experts learn": Case((5, 6), frozen=("x", "weights")),
    "only experts learn, limit": Case((5, 6), frozen=("x", "weights"), limit=2),
    "nothing learns": Case((5, 6), frozen=("x", "weights", "experts")),
    "frozen tokens on one rank": Case((5, 6), frozen_on_last=("x",)),
    "one rank needs nothing": Case((5, 6), frozen_on_last=("x", "weights")),
    "one rank needs nothing, chunks": Case((5, 6), frozen_on_last=("x", "weights"), chunks=3),
    "one rank needs nothing, limit": Case((5, 6), frozen_on_last=("x", "weights"), limit=2),
    "one rank needs nothing and has none": Case((5, 0), frozen_on_last=("x", "weights")),
    "frozen experts, one rank needs nothing": Case((5, 6), frozen=("experts",), frozen_on_last=("x", "weights")),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    """Of every case, by rank; one start of processes for all cases of a number of ranks."""
    found: dict[str, list[Outcome]] = {}
    for ranks in {len(case.tokens) for case in NAMES.values()}:
        names = [name for name, case in NAMES.items() if len(case.tokens) == ranks]
        by_rank = run_local(dispatch_all, ranks, ([NAMES[name] for name in names],), timeout=60)
        found |= {name: list(of_ranks) for name, of_ranks in zip(names, zip(*by_rank))}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_equals_one_process(outcomes: dict[str, list[Outcome]], name: str) -> None:
    require_equal(NAMES[name], outcomes[name])


def test_nothing_learns_means_no_graph(outcomes: dict[str, list[Outcome]]) -> None:
    assert not any(outcome.requires_grad for outcome in outcomes["nothing learns"])


@pytest.mark.parametrize("name", [name for name, case in NAMES.items() if case.limit])
def test_a_limit_holds_in_forward_and_backward(outcomes: dict[str, list[Outcome]], name: str) -> None:
    case = NAMES[name]
    for rank, outcome in enumerate(outcomes[name]):
        assert max(outcome.received, default=0) <= case.limit
        again = 2 if outcome.requires_grad else 1  # backward computes each round once more
        assert len(outcome.received) == again * outcome.forward_calls
        first, end = case.bounds[rank], case.bounds[rank + 1]
        ids = [case.leaves(source)[2] for source in range(len(case.tokens))]
        coming = sum(int(((each >= first) & (each < end)).any(1).sum()) for each in ids)
        assert sum(outcome.received) == again * coming


def test_a_round_keeps_nothing_of_its_rows(outcomes: dict[str, list[Outcome]]) -> None:
    for name in ("limit", "limit and chunks", "all to one expert, limit"):
        assert [outcome.kept for outcome in outcomes[name]] == [0] * len(NAMES[name].tokens)
    assert all(outcome.kept == sum(outcome.received) > 0 for outcome in outcomes["two ranks"])  # so one would see it


def test_the_worst_case_needs_the_smallest_limit(outcomes: dict[str, list[Outcome]]) -> None:
    assert outcomes["all to one expert, limit"][0].forward_calls >= 27 / 3
