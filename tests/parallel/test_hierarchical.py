"""Two hops, between nodes and within one: the same results as one hop, and no token crosses to a node twice."""

import pytest

from moe.parallel.local_ranks import run_local
from tests.support.ranks import Case, Outcome, dispatch_over_nodes, require_equal

CASES = {
    "even": Case((5, 4, 6, 3), num_experts=8, top_k=4),
    "uneven experts": Case((5, 4, 6, 3), num_experts=7, top_k=3),
    "no tokens on two ranks": Case((5, 0, 6, 0), num_experts=6, top_k=3),
    "nothing for the second node": Case((5, 4, 6, 3), chosen="first"),
    "dropped assignments, chunks": Case((9, 4, 6, 3), chosen="few", chunks=2, num_experts=8, top_k=4),
    # Counterparts of one place have more rows for each other than those of the other: all must go as many rounds.
    "limit, unequal places": Case((30, 1, 2, 1), num_experts=8, top_k=4, limit=4),
    "limit, all to one expert": Case((9, 8, 7, 3), chosen="first", limit=4),
    "copies": Case((5, 4, 6, 3), copies=2, top_k=3),
    "one rank needs nothing": Case((5, 4, 6, 3), frozen_on_last=("x", "weights")),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[tuple[Outcome, int, int]]]:
    by_rank = run_local(dispatch_over_nodes, 4, (list(CASES.values()), 2), timeout=60)
    return {name: list(of_ranks) for name, of_ranks in zip(CASES, zip(*by_rank))}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(outcomes: dict[str, list[tuple[Outcome, int, int]]], name: str) -> None:
    require_equal(CASES[name], [outcome for outcome, _, _ in outcomes[name]])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.limit])
def test_a_limit_holds_for_what_the_experts_get(outcomes: dict[str, list[tuple[Outcome, int, int]]], name: str) -> None:
    received = [max(outcome.received, default=0) for outcome, _, _ in outcomes[name]]
    assert 0 < max(received) <= CASES[name].limit


@pytest.mark.parametrize("name", CASES)
def test_a_token_crosses_to_a_node_at_most_once(outcomes: dict[str, list[tuple[Outcome, int, int]]], name: str) -> None:
    case = CASES[name]
    middle = case.bounds[len(case.bounds) // 2]
    for rank, (_, crossed, crossed_flat) in enumerate(outcomes[name]):
        ids = case.leaves(rank)[2]
        elsewhere = (ids >= middle) if rank < 2 else (ids >= 0) & (ids < middle)
        assert crossed == elsewhere.any(1).sum()
        assert crossed_flat >= crossed
    if name == "even":
        assert sum(each[2] for each in outcomes[name]) > sum(each[1] for each in outcomes[name])
