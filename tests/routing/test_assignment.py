"""Sinkhorn and balanced assignment: marginals, balance, and the best assignment by trying all."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.routing import assignment, balanced_assignment, sinkhorn_plan
from moe.routing.router import Tokens
from tests.routing.zoo import build


@given(st.integers(1, 50), st.integers(1, 10), st.floats(0.1, 3.0), st.booleans())
@settings(max_examples=60)
def test_rows_of_the_plan_sum_to_one_and_columns_to_an_even_share(num_tokens, num_experts, spread, masked):
    torch.manual_seed(num_tokens)
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64) * spread
    mask = torch.rand(num_tokens) < 0.6 if masked else None
    counts = torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask
    if mask is not None:
        logits[~mask] = float("inf")  # padding may hold anything
    plan = sinkhorn_plan(logits, mask, iterations=2000)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), counts.double())
    share = torch.full((num_experts,), int(counts.sum()) / num_experts, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), share, rtol=1e-3, atol=1e-3)


def test_the_plan_is_a_scaling_of_the_exponentials():
    """Rows and columns times a factor each: every 2 x 2 minor keeps its cross ratio."""
    logits = torch.randn(7, 5, dtype=torch.float64)
    plan = sinkhorn_plan(logits, iterations=50)
    cross = plan.log()[:, :1] - plan.log() - (logits[:, :1] - logits)
    torch.testing.assert_close(cross, cross[:1].expand_as(cross))


def test_more_iterations_bring_columns_closer_and_large_logits_stay_finite():
    logits = torch.randn(60, 8) * 3 + torch.linspace(0, 6, 8)
    errors = [(sinkhorn_plan(logits, iterations=n).sum(0) - 7.5).abs().max().item() for n in (1, 5, 20)]
    assert errors[0] > errors[1] > errors[2]
    assert torch.isfinite(sinkhorn_plan(logits * 1000)).all()


def test_sinkhorn_balances_in_training_and_does_not_in_evaluation():
    router = build("sinkhorn", num_experts=8, top_k=1)
    with torch.no_grad():
        router.weight[3] += 1.0
    x = torch.randn(400, 16) + 0.3
    training, evaluation = router(x), router.eval()(x)
    assert evaluation.tokens_per_expert().max() > 250
    assert training.tokens_per_expert().max() < 100
    assert torch.equal(training.expert_ids[:, 0], sinkhorn_plan(training.logits).argmax(-1).int())
    chosen = training.logits.softmax(-1).gather(1, training.expert_ids.long())
    torch.testing.assert_close(training.weights, chosen)


def costs_by_definition(scores: np.ndarray, has: np.ndarray) -> np.ndarray:
    """What each expert loses by giving a token to another, from the tables ``(E, T)`` alone."""
    cost = np.empty((len(has), len(has)), np.int64)
    for source, target in itertools.product(range(len(has)), repeat=2):
        can = has[source] & ~has[target]
        cost[source, target] = (scores[source, can] - scores[target, can]).min(initial=2**60)
    return cost


@given(st.integers(1, 30), st.integers(2, 9), st.integers(1, 20), st.integers(0, 10**6), st.data())
@settings(max_examples=200)
def test_costs_after_a_chain_of_exchanges_are_those_of_the_definition(num_tokens, num_experts, spread, seed, data):
    top_k = data.draw(st.integers(1, num_experts - 1))
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, spread, (num_experts, num_tokens))  # of a small spread many are equal
    has = rng.random(scores.shape).argsort(0) < top_k
    cost = costs_by_definition(scores, has)
    for _ in range(5):
        moves = []
        for source, target in itertools.pairwise(rng.permutation(num_experts)[: rng.integers(2, 6)].tolist()):
            if not (has[source] & ~has[target]).any():
                break
            moves.append((assignment._exchange(scores, has, source, target), source, target))
        for move in moves:
            assignment._correct_costs(cost, scores, has, *move)
        assert np.array_equal(cost, costs_by_definition(scores, has))


def best_by_trying_all(scores: np.ndarray, top_k: int) -> float:
    """The largest sum of scores over all assignments whose loads are the share, rounded down or up."""
    num_tokens, num_experts = scores.shape
    low, rest = divmod(num_tokens * top_k, num_experts)
    best = {(0,) * num_experts: 0.0}  # of each vector of loads, token by token
    for row in scores:
        following: dict[tuple[int, ...], float] = {}
        for load, total in best.items():
            for chosen in itertools.combinations(range(num_experts), top_k):
                new = tuple(n + (e in chosen) for e, n in enumerate(load))
                if max(new) <= low + (rest > 0):
                    following[new] = max(following.get(new, -np.inf), total + row[list(chosen)].sum())
        best = following
    return max(total for load, total in best.items() if min(load) >= low)


@given(st.integers(1, 7), st.integers(1, 5), st.booleans(), st.integers(0, 10**6), st.data())
@settings(max_examples=150)
def test_no_balanced_assignment_has_a_larger_sum(num_tokens, num_experts, ties, seed, data):
    top_k = data.draw(st.integers(1, num_experts))
    scores = np.random.default_rng(seed).normal(size=(num_tokens, num_experts)).astype(np.float32)
    scores = scores.round() if ties else scores
    ids = balanced_assignment(scores, top_k)
    assert ids.shape == (num_tokens, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    load = np.bincount(ids.ravel(), minlength=num_experts)
    assert load.max() - load.min() <= 1
    chosen = np.take_along_axis(scores.astype(np.float64), ids, 1)
    assert (np.diff(chosen, axis=1) <= 0).all()
    # A range below 10 times T * K * 2^-32, and sums of doubles.
    assert chosen.sum() == pytest.approx(best_by_trying_all(scores.astype(np.float64), top_k), abs=1e-6)


@pytest.mark.parametrize("far", [1e20, -3e38])
def test_a_score_that_has_run_away_leaves_the_others_apart(far):
    scores = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    scores[7, 2] = far
    moderate = np.where(np.abs(scores) > 1e4, np.sign(far) * 1000, scores)
    assert np.array_equal(balanced_assignment(scores, 2), balanced_assignment(moderate, 2))


@pytest.mark.parametrize(
    "scores",
    [
        np.zeros((300, 12)),
        np.tile(np.arange(12.0), (300, 1)),
        np.full((300, 12), np.nan),
        np.where(np.arange(12) == 3, np.inf, -np.inf) * np.ones((300, 1)),
        np.random.default_rng(0).normal(size=(5, 12))[np.arange(300) % 5],
        np.random.default_rng(0).normal(size=(301, 12)) + 50 * np.arange(12),
        np.zeros((0, 12)),
    ],
    ids=["equal", "all alike", "nan", "infinite", "few kinds", "skewed", "none"],
)
@pytest.mark.parametrize("top_k", [1, 3, 12])
def test_loads_are_within_one_whatever_the_scores_are(scores, top_k):
    ids = balanced_assignment(scores.astype(np.float32), top_k)
    load = np.bincount(ids.ravel(), minlength=12)
    assert load.max() - load.min() <= 1
    assert load.sum() == len(scores) * top_k
    assert all(len(set(row)) == top_k for row in ids.tolist())


@pytest.mark.parametrize("masked", [False, True])
def test_base_loads_are_within_one_in_training_and_free_in_evaluation(masked):
    router = build("base", num_experts=7, top_k=2)
    with torch.no_grad():
        router.weight[3] += 1.0
    x, mask = torch.randn(101, 16) + 0.3, torch.rand(101) < 0.7 if masked else None
    load = router(x, mask).tokens_per_expert()
    assert load.max() - load.min() <= 1
    assert load.sum() == 2 * (101 if mask is None else int(mask.sum()))
    assert router.eval()(x, mask).tokens_per_expert().max() > load.max() + 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_a_token_that_is_not_finite_is_routed_alone_and_the_others_as_without_it(name, bad):
    router = build(name, num_experts=6, top_k=2)
    logits = torch.randn(61, 6) + torch.arange(6)
    logits[::20, 3] = bad
    rows = torch.arange(61) % 20 > 0
    ids = router.decide(logits, Tokens(), None).expert_ids
    assert torch.equal(ids[rows], router.decide(logits[rows], Tokens(), None).expert_ids)
    rest = logits[~rows].nan_to_num(nan=float("inf"))
    prices = 0.0
    if name == "sinkhorn":  # what the plan of the others takes off a token's logits, up to a constant
        prices = (logits[rows] - sinkhorn_plan(logits[rows]).log())[0]
    assert torch.equal(ids[~rows], (rest - prices).topk(2).indices.int())
    masked = router.decide(logits, Tokens(torch.arange(61) % 2 > 0), None).expert_ids
    assert (masked[::2] == -1).all()


@pytest.mark.parametrize("mask", [None, torch.arange(5) < 3])
def test_no_finite_token_at_all(mask):
    for name in ("base", "sinkhorn"):
        ids = (
            build(name, num_experts=4, top_k=2).decide(torch.full((5, 4), float("nan")), Tokens(mask), None).expert_ids
        )
        assert ids[:3].tolist() == [[0, 1]] * 3


def test_the_assignment_is_a_well_formed_operation():
    mask = torch.arange(8) % 3 > 0
    torch.library.opcheck(torch.ops.moe.balanced_assignment.default, (torch.randn(8, 4), mask, 2))


def test_bad_options_are_named():
    with pytest.raises(ConfigError, match="iterations=0 must be positive"):
        build("sinkhorn", iterations=0)
