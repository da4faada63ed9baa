"""What MaxVio is by chance: the formula against simulated routers, and against the exact mean of the largest normal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.monitor import LoadStats, max_violation, max_violation_floor


def floor_of(counts, null=0):
    count = torch.tensor(0)
    return LoadStats(torch.tensor(counts), count, count, count.float(), null).max_vio_floor


def largest_normal(num_experts):
    """Mean of the largest of E standard normal numbers, by the trapezoid rule on its distribution function."""
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    below = torch.special.ndtr(x) ** num_experts
    return torch.trapezoid(torch.where(x > 0, 1 - below, -below), x).item()


def measured(draws, num_experts):
    return torch.stack([max_violation(torch.bincount(d.flatten(), minlength=num_experts)) for d in draws]).mean().item()


@pytest.mark.parametrize("num_experts", [2, 8, 64, 256])
def test_floor_and_the_mean_that_a_balanced_router_shows(num_experts):
    """The largest number spreads by a fifth (64 experts) to three quarters (2) of its mean; 400 draws: 1 to 4 %."""
    n = 1024
    draws = torch.randint(num_experts, (400, n * num_experts))
    mean, floor = measured(draws, num_experts), max_violation_floor(num_experts, n)
    factor = {2: 0.48, 8: 0.70, 64: 0.81, 256: 0.85}[num_experts]  # as the docstring has it
    assert factor == pytest.approx(largest_normal(num_experts) / math.sqrt(2 * math.log(num_experts)), abs=0.006)
    assert mean / floor == pytest.approx(factor, rel=0.1 if num_experts == 2 else 0.04)


@pytest.mark.parametrize(("n", "factor"), [(1, 1.14), (16, 0.93)])
def test_few_assignments_show_more(n, factor):
    draws = torch.randint(256, (400, n * 256))
    assert measured(draws, 256) / max_violation_floor(256, n) == pytest.approx(factor, rel=0.04)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 4), (16, 4)])
def test_distinct_experts_show_less(num_experts, top_k):
    tokens = 1024
    draws = torch.rand(300, tokens, num_experts).topk(top_k).indices
    floor = max_violation_floor(num_experts, tokens * top_k / num_experts)
    less = math.sqrt((1 - top_k / num_experts) / (1 - 1 / num_experts))
    normal = largest_normal(num_experts) / math.sqrt(2 * math.log(num_experts))
    assert measured(draws, num_experts) / floor == pytest.approx(less * normal, rel=0.06)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_floor_of_counts_is_that_of_their_mean(counts):
    expected = max_violation_floor(len(counts), sum(counts) / len(counts))
    assert floor_of(counts).item() == pytest.approx(expected, rel=1e-5)
    assert floor_of([*counts, 7, 9], null=2) == floor_of(counts)


def test_floor_of_one_expert_is_zero():
    assert max_violation_floor(1, 100) == max_violation_floor(8, 0) == 0
    assert floor_of([5]) == floor_of([0, 0]) == 0
