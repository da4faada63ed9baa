"""Margin and drift of kept decisions against plain loops over sets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.errors import ConfigError, ShapeError
from moe.monitor import Decisions, decision_drift, router_margin
from moe.routing import SigmoidRouter, SoftmaxRouter
from moe.types import Routing


def decisions(ids, num_experts=6, scores=None, mask=None):
    ids = torch.tensor(ids, dtype=torch.int32)
    return Decisions(ids, num_experts, scores, None if mask is None else torch.tensor(mask))


def rows(num_experts, slots):
    """A token's experts: different ones, in any order, -1 in the slots that are left."""
    experts = st.lists(st.integers(0, num_experts - 1), max_size=slots, unique=True)
    return experts.map(lambda chosen: chosen + [-1] * (slots - len(chosen)))


def drift_by_loops(before, after):
    changed, first = [], []
    for one, two in zip(before, after):
        a, b = set(one) - {-1}, set(two) - {-1}
        if a or b:
            changed.append(1 - len(a & b) / max(len(a), len(b)))
            first.append(one[0] != two[0])
    return (sum(changed) / len(changed), sum(first) / len(first)) if changed else (0, 0)


@given(st.lists(st.tuples(rows(6, 3), rows(6, 4)), min_size=1, max_size=12))
def test_drift_follows_its_formula(pairs):
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    found = decision_drift(decisions(before), decisions(after))
    changed, first = drift_by_loops(before, after)
    assert found.changed.item() == pytest.approx(changed, abs=1e-6)
    assert found.first_changed.item() == pytest.approx(first, abs=1e-6)


@given(st.lists(rows(6, 3), min_size=1, max_size=12))
def test_drift_of_decisions_with_themselves_is_zero(ids):
    found = decision_drift(decisions(ids), decisions(ids))
    assert (found.changed, found.first_changed) == (0, 0)


def test_drift_does_not_look_at_the_order_but_for_the_best():
    found = decision_drift(decisions([[0, 1], [2, 3]]), decisions([[1, 0], [2, 4]]))
    assert (found.changed, found.first_changed) == (0.25, 0.5)


def test_padding_has_no_drift():
    mask = [True, False]
    found = decision_drift(decisions([[0, 1], [-1, -1]], mask=mask), decisions([[2, 3], [-1, -1]], mask=mask))
    assert (found.changed, found.first_changed) == (1, 1)


def test_unrelated_routers_share_what_chance_gives():
    """4,000 tokens, K=2 of E=8: the share has mean 1 - 2/8 and a standard error of 0.33 / sqrt(4000) = 0.005."""
    ids = [torch.rand(4000, 8).topk(2).indices.int() for _ in range(2)]
    assert decision_drift(*(Decisions(each, 8) for each in ids)).changed.item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (decisions([[0, 1]]), r"\(2, 6\) and \(1, 6\)"),
        (decisions([[0, 1], [2, 3]], 7), r"\(2, 6\) and \(2, 7\)"),
        (decisions([[0, 1], [2, 3]], mask=[True, False]), "token_mask"),
    ],
)
def test_drift_needs_the_same_tokens(other, message):
    with pytest.raises(ShapeError, match=message):
        decision_drift(decisions([[0, 1], [2, 3]]), other)


def margin_by_loops(ids, scores):
    gaps = []
    for experts, values in zip(ids, scores):
        chosen = {e for e in experts if e >= 0}
        rest = set(range(len(values))) - chosen
        if chosen and rest:
            gaps.append(min(values[e] for e in chosen) - max(values[e] for e in rest))
    return sum(gaps) / len(gaps) if gaps else 0.0


@given(st.lists(rows(4, 4), min_size=1, max_size=12), st.integers(0, 9), st.booleans())
def test_margin_follows_its_formula(ids, seed, biased):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(ids), 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator) if biased else None
    found = router_margin(decisions(ids, 4, scores), bias)
    expected = margin_by_loops(ids, (scores if bias is None else scores + bias).tolist())
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_a_tie_has_no_margin():
    assert router_margin(decisions([[0, 1]], 3, torch.tensor([[0.5, 0.25, 0.25]]))) == 0


def test_margin_of_a_biased_router_is_what_would_flip_it():
    """Scores without the bias can show a negative gap; with it top-k never does."""
    router = SigmoidRouter(8, 6, 2, score_bias=True)
    router.score_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.0]))
    kept = Decisions.of([router(torch.randn(50, 8))])
    assert router_margin(kept) < 0 < router_margin(kept, router.score_bias)
    worst = (kept.scores + router.score_bias).topk(3).values
    assert router_margin(kept, router.score_bias).item() == pytest.approx((worst[:, 1] - worst[:, 2]).mean().item())


def test_margin_needs_scores_and_a_bias_that_fits(unchecked):
    with pytest.raises(ConfigError, match="scores=None"):
        router_margin(decisions([[0, 1]]))
    with pytest.raises(ShapeError, match=r"score_bias of shape \(3,\) must be \(6,\)"):
        router_margin(decisions([[0, 1]], scores=torch.rand(1, 6)), torch.zeros(3))


def test_calls_follow_one_another():
    router, x = SoftmaxRouter(8, 6, 2), torch.randn(7, 8)
    mask = torch.tensor([True, True, False])
    whole = router(x)
    kept = Decisions.of([router(x[:4]), router(x[4:], mask)])
    assert kept.expert_ids[:6].tolist() == whole.expert_ids[:6].tolist()
    assert kept.expert_ids[6].tolist() == [-1, -1]
    assert kept.token_mask.tolist() == [True] * 6 + [False]
    assert torch.allclose(kept.scores, whole.scores)
    assert not kept.scores.requires_grad
    bare = Decisions.of([router(x)], keep_scores=False)
    assert (bare.scores, bare.token_mask, bare.num_experts) == (None, None, 6)


def test_calls_are_of_one_router():
    with pytest.raises(ConfigError, match="at least one"):
        Decisions.of([])
    x = torch.randn(2, 8)
    with pytest.raises(ShapeError, match=r"\[\(4, 2\), \(6, 2\)\]"):
        Decisions.of([SoftmaxRouter(8, 6, 2)(x), SoftmaxRouter(8, 4, 2)(x)])


def test_null_experts_are_experts_like_others():
    scores = torch.rand(2, 4)
    routing = Routing(torch.tensor([[0, 3], [1, 2]]).int(), scores[:, :2], scores, scores, num_null_experts=1)
    assert Decisions.of([routing]).num_experts == 4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"num_experts": 3}, ConfigError, "expert_ids from 0 to 3 must be from -1 to 2, since num_experts=3"),
        ({"num_experts": 0}, ConfigError, "num_experts=0 must be positive"),
        ({"scores": torch.rand(1, 3)}, ShapeError, r"scores of shape \(1, 3\) must be \(tokens, experts\)=\(1, 6\)"),
        ({"token_mask": torch.ones(2, dtype=torch.bool)}, ShapeError, "token_mask has 2 tokens, but expert_ids has 1"),
    ],
)
def test_what_does_not_fit_is_said(unchecked, fields, error, message):
    with pytest.raises(error, match=message):
        Decisions(**{"expert_ids": torch.tensor([[0, 3]]).int(), "num_experts": 6, **fields})


def test_no_tokens_are_allowed():
    nothing = Decisions(torch.empty(0, 2, dtype=torch.int32), 4, torch.empty(0, 4))
    assert router_margin(nothing) == decision_drift(nothing, nothing).changed == 0
    assert not math.isnan(decision_drift(nothing, nothing).first_changed.item())
