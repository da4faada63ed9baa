"""Expert choice: every expert is exactly full, the best tokens are taken, and padding is nobody's choice."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import ConfigError
from tests.routing.zoo import build


@given(st.integers(1, 60), st.integers(1, 9), st.floats(0.3, 3.0), st.booleans(), st.booleans(), st.data())
@settings(max_examples=80)
def test_each_expert_takes_exactly_its_best_tokens(num_tokens, num_experts, factor, masked, ties, data):
    top_k = data.draw(st.integers(1, num_experts))
    router = build("expert_choice", 8, num_experts, top_k, capacity_factor=factor)
    x = torch.randn(num_tokens, 8)
    if ties:
        x = x[torch.randint(0, 3, (num_tokens,)) % num_tokens]
    mask = torch.rand(num_tokens) < 0.7 if masked else None
    counts = torch.ones(num_tokens, dtype=torch.bool) if mask is None else mask
    capacity = math.floor(factor * int(counts.sum()) * top_k / num_experts + 1e-6)
    if mask is None and capacity == 0:
        with pytest.raises(ConfigError, match=f"top_k={top_k} of num_experts={num_experts}"):
            router(x)
        return
    routing = router(x, mask)
    allowed = [t for t in range(num_tokens) if counts[t]]
    for e in range(num_experts):
        wanted = sorted(allowed, key=lambda t: (-routing.scores[t, e].item(), t))[:capacity]
        taken = [t for t in range(num_tokens) if e in routing.expert_ids[t].tolist()]
        assert taken == sorted(wanted)
    for t in range(num_tokens):
        own = [e for e in routing.expert_ids[t].tolist() if e >= 0]
        assert own == sorted(own, key=lambda e: (-routing.scores[t, e].item(), e))
    chosen = routing.scores.gather(1, routing.expert_ids.clamp(min=0).long())
    assert torch.equal(routing.weights, chosen.where(routing.expert_ids >= 0, 0.0))


def test_a_token_that_many_chose_keeps_the_best():
    x = torch.randn(40, 16)
    free, bound = build("expert_choice", top_k=4)(x), build("expert_choice", top_k=4, max_experts=3)(x)
    assert bound.expert_ids.shape == (40, 3)
    assert torch.equal(bound.expert_ids, free.expert_ids[:, :3])
    assert (free.expert_ids[:, 3] >= 0).any()


def test_binary_noise_costs_no_place():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    router = build("expert_choice", num_experts=1, top_k=1, capacity_factor=0.29)
    x = torch.randn(100, 16)
    assert router(x).tokens_per_expert().tolist() == [29]
    assert router(x, torch.ones(100, dtype=torch.bool)).tokens_per_expert().tolist() == [29]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 must be positive"),
        ({"max_experts": 0}, "max_experts=0 must be positive"),
        ({"max_experts": 1.5}, "max_experts=1.5 must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build("expert_choice", **options)


def test_a_capacity_that_rounds_to_zero_is_named():
    with pytest.raises(ConfigError, match=r"top_k=2 of num_experts=8 .* less than one of 3 tokens"):
        build("expert_choice")(torch.randn(3, 16))
