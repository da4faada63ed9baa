"""Quantile balancing: the histogram against sorted margins, and what the exact bias does to the load."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.balance import QuantileBias, exact_quantile_bias
from moe.errors import ConfigError
from moe.kernels.margins import bin_edges, bin_of, count_margins
from tests.balance.decisions import step_counts


def draw(num_tokens, num_experts, seed, skew=2.0, sigmoid=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = logits + skew * torch.arange(num_experts) / num_experts
    return (logits.sigmoid() if sigmoid else logits.softmax(-1)).to(dtype)


def load_of(scores, bias, top_k):
    return (scores + bias).topk(top_k, -1).indices.flatten().bincount(minlength=scores.shape[1])


@st.composite
def batches(draw_from):
    num_experts = draw_from(st.integers(2, 16))
    top_k = draw_from(st.integers(1, num_experts - 1))
    num_tokens = draw_from(st.integers(1, 128))
    skew, sigmoid = draw_from(st.sampled_from([0.0, 2.0, 6.0])), draw_from(st.booleans())
    return draw(num_tokens, num_experts, draw_from(st.integers(0, 10**6)), skew, sigmoid), top_k


@given(batches())
def test_the_exact_bias_leaves_every_load_within_one_token_of_equal(batch):
    scores, top_k = batch
    num_tokens, num_experts = scores.shape
    bias = exact_quantile_bias(scores, torch.zeros(num_experts, dtype=torch.float64), top_k)
    load = load_of(scores, bias, top_k)
    assert load.sum() == num_tokens * top_k
    assert (load - num_tokens * top_k / num_experts).abs().max() <= 1
    assert abs(bias.mean().item()) < 1e-12


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1024, 64, 4), (1000, 64, 3)])
def test_the_exact_bias_on_a_larger_batch(num_tokens, num_experts, top_k):
    scores = draw(num_tokens, num_experts, 0)
    zero = torch.zeros(num_experts, dtype=torch.float64)
    before = load_of(scores, zero, top_k)
    after = load_of(scores, exact_quantile_bias(scores, zero, top_k, sweeps=100), top_k)
    mean = num_tokens * top_k / num_experts
    assert (before - mean).abs().max() > 0.5 * mean
    assert (after - mean).abs().max() <= 1


@given(st.integers(0, 1000))
def test_the_exact_bias_makes_the_assignment_of_largest_score(seed):
    """Two experts, one each token: the half of the tokens with the largest difference of scores, by sorting."""
    scores = draw(20, 2, seed)
    bias = exact_quantile_bias(scores, torch.zeros(2, dtype=torch.float64), 1)
    chosen = (scores + bias).argmax(-1)
    first = (scores[:, 0] - scores[:, 1]).argsort(descending=True)[:10]
    assert sorted((chosen == 0).nonzero().flatten().tolist()) == sorted(first.tolist())


def test_the_exact_bias_has_nothing_to_do_without_a_choice():
    bias = torch.tensor([0.3, -0.1])
    assert torch.equal(exact_quantile_bias(torch.rand(5, 2), bias, 2), bias)
    assert torch.equal(exact_quantile_bias(torch.rand(0, 2), bias, 1), bias)


@pytest.mark.parametrize(("top_k", "sweeps"), [(0, 1), (3, 1), (1, 0), (1, -2)])
def test_the_exact_bias_names_bad_arguments(top_k, sweeps):
    with pytest.raises(ConfigError, match=f"{'sweeps' if sweeps < 1 else 'top_k'}="):
        exact_quantile_bias(torch.rand(4, 2), torch.zeros(2), top_k, sweeps)


def margins_by_loops(scores, bias, top_k, mask):
    """Of each expert the sorted margins of the tokens that count."""
    values = (scores + bias).tolist()
    found = [[] for _ in range(scores.shape[1])]
    for row, counts in zip(values, mask.tolist()):
        if counts:
            for e, value in enumerate(row):
                others = sorted(row[:e] + row[e + 1 :], reverse=True)
                found[e].append(others[top_k - 1] - value)
    return [sorted(of_expert) for of_expert in found]


@given(batches(), st.integers(1, 3), st.sampled_from([1.0, 0.5]))
def test_the_histogram_is_within_a_bin_of_the_exact_quantile(batch, num_calls, damping):
    scores, top_k = batch[0].float(), batch[1]
    num_tokens, num_experts = scores.shape
    generator = torch.Generator().manual_seed(num_tokens)
    bias = 0.1 * torch.randn(num_experts, generator=generator)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    mask[0] = True
    ids = (scores + bias).topk(top_k, -1).indices.int().masked_fill(~mask[:, None], -1)
    margins = sum(
        count_margins(*part, bias, rows)
        for *part, rows in zip(scores.chunk(num_calls), ids.chunk(num_calls), mask.chunk(num_calls))
    )
    counts = step_counts([top_k * int(mask.sum())] + [0] * (num_experts - 1), top_k, int(mask.sum()), margins)
    moved, _ = QuantileBias(damping).updated(bias, torch.zeros(0, num_experts), counts)

    edges, low, high, exact = bin_edges().double(), [], [], []
    for of_expert in margins_by_loops(scores, bias, top_k, mask):
        exact.append(of_expert[math.ceil(len(of_expert) * top_k / num_experts - 1e-9) - 1])
        place = int(bin_of(torch.tensor(exact[-1])))
        low.append(edges[place].item())
        high.append(edges[place + 1].item())
    base = damping * torch.tensor(exact, dtype=torch.float64) + bias
    width = damping * (torch.tensor(high, dtype=torch.float64) - torch.tensor(low, dtype=torch.float64))
    # Each move is within its own bin; centring adds the mean of all that is off. Float32 adds some roundings of 6e-8.
    off = (moved - (base - base.mean())).abs()
    assert (off <= width + width.mean() + 1e-6).all()
    assert abs(moved.mean().item()) < 1e-6


def test_an_expert_that_nobody_chooses_is_back_after_one_step():
    scores = draw(256, 4, 0, skew=0.0, dtype=torch.float32)
    bias = torch.tensor([0.0, 0.0, 0.0, -10.0])
    assert load_of(scores, bias, 1)[3] == 0
    ids = (scores + bias).topk(1, -1).indices.int()
    counts = step_counts(load_of(scores, bias, 1), margins=count_margins(scores, ids, bias))
    moved, _ = QuantileBias().updated(bias, torch.zeros(0, 4), counts)
    assert load_of(scores, moved, 1)[3] >= 256 / 4 / 8  # the others moved too, so not its whole share


def test_a_few_steps_balance_fixed_preferences():
    """Each expert moves as if the others stayed, so one step is not enough; some are, down to what bins tell apart."""
    scores, bias = draw(2048, 16, 0, skew=3.0, sigmoid=True, dtype=torch.float32), torch.zeros(16)
    spread = []
    for _ in range(6):
        ids = (scores + bias).topk(4, -1).indices.int()
        load = load_of(scores, bias, 4)
        spread.append(load.max().item() / 512 - 1)
        counts = step_counts(load, 4, margins=count_margins(scores, ids, bias))
        bias, _ = QuantileBias().updated(bias, torch.zeros(0, 16), counts)
    assert spread[0] > 0.5
    assert spread[-1] < 0.05


def test_without_margins_it_says_so():
    with pytest.raises(ConfigError, match=r"counts\.margins=None"):
        QuantileBias().updated(torch.zeros(2), torch.zeros(0, 2), step_counts([1, 1]))
