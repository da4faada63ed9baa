"""Routers with another number of experts for each token: ReLU and threshold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError
from moe.routing import ReluRouter, ThresholdRouter
from moe.routing.router import Tokens
from tests.routing.zoo import build


def identity(kind, num_experts, top_k, **options):
    """A router whose logits are the tokens."""
    router = kind(num_experts, num_experts, top_k, **options)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def test_relu_is_active_where_positive_and_weighs_by_the_logit():
    router = identity(ReluRouter, 4, 2, scale=2.0)
    routing = router(torch.tensor([[0.5, -1.0, 2.0, 0.0], [-1.0, -2.0, -3.0, -4.0], [1.0, 1.0, 1.0, 1.0]]))
    assert routing.expert_ids.tolist() == [[2, 0, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 3]]
    assert routing.weights.tolist() == [[4.0, 1.0, 0.0, 0.0], [0.0] * 4, [2.0] * 4]
    assert torch.equal(routing.scores, routing.logits.relu())


def test_relu_keeps_the_best_of_too_many():
    routing = identity(ReluRouter, 4, 1, max_experts=2)(torch.tensor([[1.0, 3.0, 2.0, 4.0], [1.0, -1.0, -1.0, -1.0]]))
    assert routing.expert_ids.tolist() == [[3, 1], [0, -1]]
    assert identity(ReluRouter, 4, 1, max_experts=9).num_slots == 4


def test_a_logit_of_nan_reaches_the_output_of_relu():
    routing = identity(ReluRouter, 3, 1).decide(
        torch.tensor([[1.0, float("nan"), -1.0], [1.0, 2.0, -1.0]]), Tokens(), None
    )
    assert routing.expert_ids.tolist() == [[1, 0, -1], [1, 0, -1]]
    assert routing.weights[0, 0].isnan()
    assert torch.isfinite(routing.weights[1]).all()


def test_relu_cannot_be_held_below_its_average():
    with pytest.raises(ConfigError, match="max_experts=2 must be at least top_k=3"):
        build("relu", top_k=3, max_experts=2)
    assert build("relu", top_k=3, max_experts=3).num_slots == 3


def test_the_output_of_relu_is_continuous_where_an_expert_comes():
    x = torch.tensor([[1.0, -1e-4], [1.0, 1e-4]])
    routing = identity(ReluRouter, 2, 1)(x)
    assert routing.expert_ids.tolist() == [[0, -1], [0, 1]]
    assert (routing.weights[1] - routing.weights[0]).abs().max() <= 1e-4


@given(st.integers(1, 30), st.integers(1, 9), st.floats(0.01, 1.0), st.data())
@settings(max_examples=60)
def test_threshold_takes_the_fewest_whose_scores_reach_it(num_tokens, num_experts, threshold, data):
    top_k = data.draw(st.integers(1, num_experts))
    router = build("threshold", 8, num_experts, top_k, seed=num_tokens, threshold=threshold)
    routing = router(torch.randn(num_tokens, 8) * 5)
    for scores, ids in zip(routing.scores, routing.expert_ids.tolist()):
        expected, total = [], torch.tensor(0.0)
        for e in sorted(range(num_experts), key=lambda e: (-scores[e].item(), e))[:top_k]:
            if expected and total >= threshold:
                break
            expected.append(e)
            total = total + scores[e]
        assert ids == expected + [-1] * (top_k - len(expected))


@pytest.mark.parametrize("normalize", [False, True])
def test_threshold_weights_are_of_the_kept(normalize):
    router = identity(ThresholdRouter, 4, 3, threshold=0.7, normalize=normalize)
    share = torch.tensor([[0.4, 0.1, 0.35, 0.15], [0.75, 0.05, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    routing = router(share.log())
    assert routing.expert_ids.tolist() == [[0, 2, -1], [0, -1, -1], [0, 1, 2]]
    expected = torch.tensor([[0.4, 0.35, 0.0], [0.75, 0.0, 0.0], [0.25, 0.25, 0.25]])
    torch.testing.assert_close(routing.weights, expected / expected.sum(-1, keepdim=True) if normalize else expected)


def test_a_bias_changes_the_order_and_not_what_is_summed():
    router = identity(ThresholdRouter, 3, 3, threshold=0.55, score_bias=True)
    router.score_bias[2] = 1.0
    routing = router(torch.tensor([[0.6, 0.3, 0.1]]).log())
    assert routing.expert_ids.tolist() == [[2, 0, -1]]


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5])
def test_bad_thresholds_are_named(threshold):
    with pytest.raises(ConfigError, match=f"threshold={threshold} must be"):
        build("threshold", threshold=threshold)
