"""Measures of balance against their formulas."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moe.errors import ConfigError
from moe.monitor import LoadCounter, LoadStats, count_load, max_violation
from moe.types import Routing


def stats(counts, dropped=0, tokens=1, top=0.0, null=0):
    return LoadStats(torch.tensor(counts), torch.tensor(dropped), torch.tensor(tokens), torch.tensor(top), null)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_measures_follow_their_formulas(counts):
    found, total, mean = stats(counts), sum(counts), sum(counts) / len(counts)
    assert found.dead_experts == sum(c == 0 for c in counts)
    if total == 0:
        assert found.floats() == {
            "max_vio": 0, "max_vio_floor": 0, "cv": 0, "entropy": 0, "dead_experts": len(counts), "drop_rate": 0,
            "confidence": 0,
        }  # fmt: skip
        return
    assert found.max_vio.item() == pytest.approx(max(counts) / mean - 1, rel=1e-5, abs=1e-5)
    std = math.sqrt(sum((c - mean) ** 2 for c in counts) / len(counts))
    assert found.coefficient_of_variation.item() == pytest.approx(std / mean, rel=1e-4, abs=1e-4)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c)
    assert found.entropy.item() == pytest.approx(entropy / math.log(len(counts)) if len(counts) > 1 else 0, abs=1e-5)
    assert found.load.sum().item() == pytest.approx(1, abs=1e-5)


def test_extremes():
    even, one = stats([5, 5, 5, 5]), stats([20, 0, 0, 0])
    assert (even.max_vio, even.coefficient_of_variation, even.entropy) == (0, 0, 1)
    assert (one.max_vio, one.dead_experts, one.entropy) == (3, 3, 0)


def test_counts_beyond_float32_are_exact():
    big = 2**40
    assert max_violation(torch.tensor([big, big])) == 0
    pooled = stats([big, 1]) + stats([1, big])
    assert pooled.tokens_per_expert.tolist() == [big + 1, big + 1]


def routing(ids, scores, mask=None, null=0):
    ids, scores = torch.tensor(ids, dtype=torch.int32), torch.tensor(scores)
    return Routing(ids, torch.ones(ids.shape), scores, scores, mask, num_null_experts=null)


def test_counter_adds_calls_and_starts_again():
    counter = LoadCounter()
    chosen = routing([[0, 1], [1, 2]], [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    kept = chosen.keep(torch.tensor([[True, False], [True, True]]))
    counter.count(chosen, kept)
    counter.count(chosen, chosen)
    found = counter.take()
    assert found.tokens_per_expert.tolist() == [2, 4, 2]
    assert (found.dropped, found.tokens) == (1, 4)
    assert found.drop_rate.item() == pytest.approx(1 / 8)
    assert found.confidence.item() == pytest.approx((0.5 + 0.6) / 2)
    assert counter.take() is None


def test_padding_has_no_confidence():
    counter, mask = LoadCounter(), torch.tensor([True, False])
    chosen = routing([[0], [-1]], [[0.6, 0.4], [0.9, 0.1]], mask)
    counter.count(chosen, chosen)
    assert counter.take().confidence.item() == pytest.approx(0.6)


def test_numbers_round_trip():
    first = stats([3, 2**40], 1, 7, 0.1)
    second = LoadStats.from_numbers(first.to_numbers(), torch.device("cpu"))
    assert second.tokens_per_expert.tolist() == [3, 2**40]
    assert second.top_score_sum.dtype == torch.float32
    assert second.top_score_sum == first.top_score_sum


def test_old_numbers_have_no_null_experts():
    numbers = stats([3, 1]).to_numbers()
    del numbers["num_null_experts"]
    assert LoadStats.from_numbers(numbers, torch.device("cpu")).num_null_experts == 0


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_null_experts_change_no_measure_of_the_others(real, null):
    alone, beside = stats(real, dropped=3, top=0.5), stats(real + null, dropped=3, top=0.5, null=len(null))
    found = beside.floats()
    assert found.pop("null_rate") == pytest.approx(sum(null) / max(sum(real + null), 1))
    assert found == alone.floats()
    assert beside.load.tolist() == alone.load.tolist()
    assert beside.tokens_per_real_expert.tolist() == real
    assert (alone.null_rate, beside.num_null_experts) == (0, len(null))


def test_a_null_assignment_is_no_drop():
    chosen = routing([[0, 3], [1, 0], [2, 3]], [[0.5, 0.1, 0.0, 0.4]] * 3, null=2)
    handed = chosen.keep(chosen.expert_ids < 2)
    assert count_load(chosen, handed).dropped == 0
    dropped = count_load(chosen, handed.keep(torch.tensor([[True, True], [True, False], [True, True]])))
    assert (dropped.dropped, dropped.num_null_experts) == (1, 2)
    assert dropped.tokens_per_expert.tolist() == [2, 1, 1, 2]
    assert dropped.drop_rate.item() == pytest.approx(1 / 3)
    assert dropped.null_rate.item() == pytest.approx(1 / 2)


def test_null_experts_survive_every_way_of_handing_on():
    first = stats([4, 1, 7], 1, 8, 2.5, null=1)
    ways = [
        first.to(torch.device("cpu")), LoadStats.from_numbers(first.to_numbers(), torch.device("cpu")),
        LoadStats.from_counts(first.to_counts(), 1), first + LoadStats.zero(3, torch.device("cpu"), 1),
    ]  # fmt: skip
    for way in ways:
        assert way.num_null_experts == 1
        assert way.to_numbers() == first.to_numbers()
        assert way.floats() == first.floats()


def test_loads_of_other_experts_do_not_pool():
    with pytest.raises(ConfigError, match=r"\(3, 1\) and \(3, 0\)"):
        stats([1, 2, 3], null=1) + stats([1, 2, 3])
    with pytest.raises(ConfigError, match=r"\(2, 0\) and \(1, 0\)"):
        stats([1, 2]) + stats([1])


@pytest.mark.parametrize("null", [-1, 3])
def test_some_expert_is_real(null):
    with pytest.raises(ConfigError, match=f"num_null_experts={null} must be from 0 to 2"):
        stats([1, 2, 3], null=null)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), st.floats(0, 2**20, width=32)), min_size=1))
def test_sums_over_ranks_are_exact_in_any_order(ranks):
    """Scores of each rank are rounded to 2^-24 once, their sum to float32 once, whatever the order."""
    parts = [stats([first, second], first, second, top).to_counts() for first, second, top in ranks]
    pooled = LoadStats.from_counts(sum(parts))
    assert torch.equal(sum(parts), sum(reversed(parts)))
    assert pooled.tokens_per_expert.tolist() == [sum(r[0] for r in ranks), sum(r[1] for r in ranks)]
    assert (pooled.dropped, pooled.tokens) == (sum(r[0] for r in ranks), sum(r[1] for r in ranks))
    exact = sum(Fraction(r[2]) for r in ranks)
    assert abs(Fraction(pooled.top_score_sum.item()) - exact) <= exact / 2**24 + len(ranks) * Fraction(1, 2**25)


@pytest.mark.parametrize("top", [math.nan, math.inf, -math.inf, 2.0**31, 3e38])
def test_scores_that_no_sum_can_carry_come_back_as_nan(top):
    counts = stats([1, 2], top=top).to_counts()
    assert counts[-2:].tolist() == [0, 1]  # not what a device makes of such a number as an integer
    pooled = LoadStats.from_counts(counts + stats([3, 4], top=0.5).to_counts())
    assert pooled.top_score_sum.isnan()
    assert pooled.tokens_per_expert.tolist() == [4, 6]


def test_nothing_waits_for_the_device():
    """A fake tensor has no values: reading one would raise."""
    with FakeTensorMode():
        ids, scores = torch.zeros(5, 2, dtype=torch.int32), torch.rand(5, 4)
        chosen = Routing(ids, scores[:, :2], scores, scores, torch.ones(5, dtype=torch.bool), num_null_experts=1)
        found = count_load(chosen, chosen.keep(ids < 3)) + LoadStats.zero(4, ids.device, 1)
        found = LoadStats.from_counts(found.to_counts(), found.num_null_experts)
        measures = [name for name, kind in vars(LoadStats).items() if isinstance(kind, property)]
        assert {"max_vio", "max_vio_floor", "entropy", "null_rate"} <= set(measures)
        for name in measures:
            getattr(found, name)
        with pytest.raises(DataDependentOutputException):
            found.max_vio.item()
