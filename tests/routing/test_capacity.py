"""Capacity: who stays, who goes, and that nothing else changes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import DropPolicy
from moe.routing import limit_capacity
from moe.types import Routing


def decision(ids, scores=None, mask=None, num_experts=4):
    ids = torch.tensor(ids, dtype=torch.int32)
    if scores is None:
        scores = torch.rand(len(ids), num_experts, generator=torch.Generator().manual_seed(0))
    scores = torch.as_tensor(scores)
    weights = scores.gather(1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0.0)
    return Routing(ids, weights, scores, scores.log(), None if mask is None else torch.tensor(mask))


def test_position_keeps_the_earliest():
    # Four tokens, one expert each, E=4: an even share is 1, so a factor of 2 gives room for 2.
    routing = decision([[1], [1], [0], [1]])
    kept = limit_capacity(routing, 2.0, DropPolicy.POSITION)
    assert kept.expert_ids.tolist() == [[1], [1], [0], [-1]]
    assert kept.weights[3] == 0
    assert torch.equal(kept.weights[:3], routing.weights[:3])


def test_probability_keeps_the_surest_and_the_earlier_of_equals():
    scores = [[0.1, 0.2, 0.3, 0.4], [0.1, 0.6, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]]
    routing = decision([[1], [1], [0], [1]], scores)
    kept = limit_capacity(routing, 1.0, DropPolicy.PROBABILITY)
    assert kept.expert_ids.tolist() == [[-1], [1], [0], [-1]]


def test_padding_takes_no_room_and_does_not_raise_the_capacity():
    ids = [[-1], [1], [-1], [1], [1], [1], [-1], [-1]]
    mask = [i[0] >= 0 for i in ids]
    kept = limit_capacity(decision(ids, mask=mask), 2.0, DropPolicy.POSITION)  # 4 tokens count: room for 2
    assert kept.expert_ids.flatten().tolist() == [-1, 1, -1, 1, -1, -1, -1, -1]


def test_noise_in_the_product_buys_no_place():
    """0.1 * 3 / 3 * 10 is 1 + 2e-16 in floating point; by hand it is 1."""
    ids = torch.arange(3, dtype=torch.int32).repeat(10, 1)
    scores = torch.rand(10, 3)
    for mask in (None, torch.ones(10, dtype=torch.bool)):
        kept = limit_capacity(Routing(ids, torch.ones(10, 3), scores, scores, mask), 0.1, DropPolicy.POSITION)
        assert (kept.expert_ids >= 0).sum(0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("policy", DropPolicy)
@pytest.mark.parametrize("masked", [False, True])
def test_an_expert_keeps_one_token_however_small_the_factor_is(policy, masked):
    mask = [True, False, True, True] if masked else None
    kept = limit_capacity(decision([[1], [-1], [1], [2]], mask=mask), 1e-9, policy)
    assert torch.bincount(kept.expert_ids.flatten() + 1).tolist() == [2, 0, 1, 1]


def test_capacity_rounds_up():
    # 5 tokens over 4 experts at 1.0: 1.25, so 2.
    kept = limit_capacity(decision([[2]] * 5), 1.0, DropPolicy.POSITION)
    assert (kept.expert_ids >= 0).sum() == 2


@pytest.mark.parametrize("policy", DropPolicy)
@given(st.integers(0, 40), st.integers(1, 6), st.floats(0.1, 3.0), st.data())
@settings(max_examples=40)
def test_exactly_the_best_of_each_expert_stay(policy, num_tokens, num_experts, factor, data):
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(num_tokens + 100 * num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    routing = (
        decision(ids.tolist(), scores, num_experts=num_experts)
        if num_tokens
        else Routing(torch.zeros(0, top_k, dtype=torch.int32), torch.zeros(0, top_k), scores, scores)
    )
    kept = limit_capacity(routing, factor, policy)
    capacity = max(1, math.ceil(factor * num_tokens * top_k / num_experts - 1e-6))
    for e in range(num_experts):
        wanted = [(t, k) for t in range(num_tokens) for k in range(top_k) if routing.expert_ids[t, k] == e]
        if policy is DropPolicy.PROBABILITY:
            wanted.sort(key=lambda tk: -scores[tk[0], e].item())  # a stable sort: earlier tokens first among equals
        for rank, (t, k) in enumerate(wanted):
            stays = rank < capacity
            assert kept.expert_ids[t, k] == (e if stays else -1)
            assert kept.weights[t, k] == (routing.weights[t, k] if stays else 0)
