"""The price of imbalance against the same arithmetic in plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, DtypeError, ShapeError
from moe.monitor import LoadStats, price_of_imbalance
from moe.parallel.dispatcher import even_bounds

COSTS = {
    "flops_per_assignment": 6e6, "bytes_per_assignment": 4096.0, "flops_per_second": 1e14, "bytes_per_second": 5e10
}  # fmt: skip


def price(counts, num_ranks, **options):
    return price_of_imbalance(torch.tensor(counts), num_ranks, **{**COSTS, **options})


def by_loops(steps, bounds):
    """Rows of the busiest rank and of a mean rank, averaged over steps."""
    ranks, busiest, even = len(bounds) - 1, 0, 0
    for step in steps:
        rows = []
        for rank in range(ranks):
            count = 0
            for expert in range(bounds[rank], bounds[rank + 1]):
                count += step[expert]
            rows.append(count)
        busiest += max(rows)
        even += sum(rows) / ranks
    return busiest / len(steps), even / len(steps)


STEPS = st.integers(1, 9).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 10**6), min_size=size, max_size=size), min_size=1, max_size=5)
)


@given(STEPS, st.data())
def test_every_figure_follows_its_formula(steps, data):
    ranks = data.draw(st.integers(1, len(steps[0])))
    found = price(steps, ranks)
    busiest, even = by_loops(steps, even_bounds(len(steps[0]), ranks))
    assert found.factor == pytest.approx(busiest / even if even else 1)
    assert found.compute_seconds == pytest.approx(busiest * 6e6 / 1e14)
    assert found.even_compute_seconds == pytest.approx(even * 6e6 / 1e14)
    arriving = 4096 * (ranks - 1) / ranks
    assert found.exchange_bytes == pytest.approx(busiest * arriving)
    assert found.even_exchange_bytes == pytest.approx(even * arriving)
    assert found.exchange_seconds == pytest.approx(busiest * arriving / 5e10)
    assert found.even_exchange_seconds == pytest.approx(even * arriving / 5e10)
    assert found.bytes_lost == pytest.approx((busiest - even) * arriving, abs=1e-3)
    assert found.seconds_lost == pytest.approx((busiest - even) * (6e6 / 1e14 + arriving / 5e10), abs=1e-12)
    assert found.share_lost == pytest.approx(1 - even / busiest if busiest else 0, abs=1e-9)
    assert 1 <= found.factor <= ranks + 1e-9


@given(st.integers(0, 10**9), st.integers(1, 8), st.integers(1, 8))
def test_even_loads_cost_nothing(count, ranks, experts_per_rank):
    found = price([[count] * (ranks * experts_per_rank)] * 3, ranks)
    assert (found.factor, found.seconds_lost, found.share_lost, found.bytes_lost) == (1, 0, 0, 0)


def test_all_on_one_rank_costs_as_much_as_there_are_ranks():
    found = price([7, 9, 0, 0, 0, 0, 0, 0], 4)
    assert found.factor == 4
    assert found.share_lost == pytest.approx(3 / 4)


def test_pooled_counts_hide_what_changes_sides():
    steps = torch.tensor([[30, 10, 0, 0], [0, 0, 10, 30]])
    assert price(steps.tolist(), 2).factor == 2
    assert price(steps.sum(0).tolist(), 2).factor == 1


def test_a_step_counts_by_its_size():
    """Maxima 90 and 10 over means 50 and 10: seconds add up, so factors are not averaged as they are."""
    assert price([[90, 10], [10, 10]], 2).factor == pytest.approx(100 / 60)


def test_one_rank_exchanges_nothing():
    found = price([5, 1, 0], 1)
    assert (found.factor, found.exchange_bytes, found.bytes_lost, found.seconds_lost) == (1, 0, 0, 0)


def test_ranks_hold_what_bounds_say():
    counts = [8, 1, 1, 1, 1]
    assert price(counts, 2).compute_seconds == pytest.approx(9 * 6e6 / 1e14)  # (0, 2, 5), as moe.parallel has it
    assert price(counts, 2, bounds=(0, 1, 5)).compute_seconds == pytest.approx(8 * 6e6 / 1e14)
    assert price(counts, 3, bounds=[0, 5, 5, 5]).factor == 3  # a rank may hold none if asked


def test_counts_beyond_float64_are_exact():
    assert price([2**60 + 1, 2**60 + 1], 2).factor == 1


def test_null_experts_are_left_out():
    count = torch.tensor(0)
    stats = LoadStats(torch.tensor([3, 3, 100]), count, count, count.float(), 1)
    assert price_of_imbalance(stats.tokens_per_real_expert, 2, **COSTS).factor == 1


@pytest.mark.parametrize(
    ("counts", "ranks", "options", "error", "message"),
    [
        ([1, 2], 0, {}, ConfigError, "num_ranks=0 must be positive"),
        ([1, 2], 3, {}, ConfigError, "num_ranks=3 is more than 2 experts"),
        ([1, 2], 2, {"flops_per_second": 0}, ConfigError, "flops_per_second=0 must be positive"),
        ([1, 2], 2, {"bytes_per_assignment": -1.0}, ConfigError, "bytes_per_assignment=-1.0 must be positive"),
        ([1, 2], 2, {"bounds": (0, 2)}, ConfigError, r"bounds=\(0, 2\) must be 3 numbers that ascend from 0 to 2"),
        ([1, 2], 2, {"bounds": (0, 3, 2)}, ConfigError, "bounds"),
        ([1, 2], 2, {"bounds": (1, 1, 2)}, ConfigError, "bounds"),
        ([1, 2], 2, {"bounds": (0, 1, 3)}, ConfigError, "bounds"),
        ([1, -2], 2, {}, ConfigError, "tokens_per_expert has -2"),
        ([0.5, 0.5], 2, {}, DtypeError, "torch.float32"),
        ([[[1, 2]]], 2, {}, ShapeError, r"\(1, 1, 2\)"),
        ([[], []], 1, {}, ShapeError, r"\(2, 0\)"),
    ],
)
def test_what_does_not_fit_is_said(unchecked, counts, ranks, options, error, message):
    counts = torch.tensor(counts, dtype=None if error is DtypeError else torch.int64)
    with pytest.raises(error, match=message):
        price_of_imbalance(counts, ranks, **{**COSTS, **options})
