"""Rounds: every row goes once, nobody receives too much, and there are few of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe.parallel.rounds import Round, count_rounds, plan_rounds

sizes = st.integers(1, 5)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None]:
    """Counts, chunks and a limit."""
    size = draw(sizes)
    row = st.lists(st.integers(0, 40), min_size=size, max_size=size)
    counts = np.array(draw(st.lists(row, min_size=size, max_size=size)), dtype=np.int64)
    return counts, draw(st.integers(1, 4)), draw(st.none() | st.integers(size, size + 20))


def plan_all(counts: np.ndarray, chunks: int, limit: int | None) -> list[list[Round]]:
    return [plan_rounds(counts, rank, count_rounds(counts, chunks, limit)) for rank in range(len(counts))]


@given(exchanges())
def test_every_row_goes_exactly_once(exchange: tuple[np.ndarray, int, int | None]) -> None:
    counts, chunks, limit = exchange
    for source, rounds in enumerate(plan_all(counts, chunks, limit)):
        for to, count in enumerate(counts[source]):
            gone = [row for each in rounds for row in range(each.first[to], each.first[to] + each.sent[to])]
            assert gone == list(range(count))


@given(exchanges())
def test_ranks_agree(exchange: tuple[np.ndarray, int, int | None]) -> None:
    views = plan_all(*exchange)
    assert len({len(rounds) for rounds in views}) == 1
    for rounds in zip(*views):
        sent = np.array([each.sent for each in rounds])
        assert (np.array([each.received for each in rounds]) == sent.T).all()


@given(exchanges())
def test_nobody_receives_more_than_the_limit_in_few_rounds(exchange: tuple[np.ndarray, int, int | None]) -> None:
    counts, chunks, limit = exchange
    views = plan_all(counts, chunks, limit)
    rounds = len(views[0])
    assert rounds >= chunks
    if limit is None:
        assert rounds == chunks
        return
    assert max(sum(each.received) for view in views for each in view) <= limit
    # A round's share of c rows is below c / rounds + 1, so a rank receives less than sum / rounds + G in it; and with
    # the largest count as the number of rounds a row from each source.
    enough = min(-(-counts.sum(0).max() // (limit - len(counts) + 1)), counts.max())
    assert rounds <= max(chunks, enough + enough // 16)


def test_remainders_are_staggered() -> None:
    # One row from each of four sources, two at a time: cut alike, all four would go in the last round.
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[:, 0] = 1
    assert [sum(each.received) for each in plan_rounds(counts, 0, 2)] == [2, 2]
    assert count_rounds(counts, 1, 4) == 1


def test_documented_example() -> None:
    counts = np.array([[4, 0], [3, 0]])
    assert count_rounds(counts, 1, 4) == 2
    assert [each.sent for each in plan_rounds(counts, 0, 2)] == [[2, 0], [2, 0]]
    assert [each.sent for each in plan_rounds(counts, 1, 2)] == [[2, 0], [1, 0]]
