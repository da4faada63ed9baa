"""Measures of balance against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.monitor import LoadCounter, LoadStats, max_violation, max_violation_floor
from moe.types import Routing


def stats(counts, dropped=0, tokens=1, top=0.0):
    return LoadStats(torch.tensor(counts), torch.tensor(dropped), torch.tensor(tokens), torch.tensor(top))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_measures_follow_their_formulas(counts):
    found, total, mean = stats(counts), sum(counts), sum(counts) / len(counts)
    assert found.dead_experts == sum(c == 0 for c in counts)
    if total == 0:
        assert found.floats() == {
            "max_vio": 0, "cv": 0, "entropy": 0, "dead_experts": len(counts), "drop_rate": 0, "confidence": 0
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


def routing(ids, scores, mask=None):
    ids, scores = torch.tensor(ids, dtype=torch.int32), torch.tensor(scores)
    return Routing(ids, torch.ones(ids.shape), scores, scores, mask)


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


@pytest.mark.parametrize(("num_experts", "n"), [(16, 256), (64, 128), (64, 1024)])
def test_floor_bounds_what_an_even_router_shows(num_experts, n):
    """The mean largest of E Gaussians is 0.75 (E=16) and 0.82 (E=64) of sqrt(2 ln E); 200 draws: about 2 %."""
    draws = torch.multinomial(torch.ones(200, num_experts), n * num_experts, replacement=True)
    measured = torch.stack([max_violation(torch.bincount(d, minlength=num_experts)) for d in draws]).mean().item()
    assert 0.7 < measured / max_violation_floor(num_experts, n) < 0.9


def test_floor_of_one_expert_is_zero():
    assert max_violation_floor(1, 100) == max_violation_floor(8, 0) == 0
