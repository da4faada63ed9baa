"""The loss of ReMoE, whose strength follows how many experts a token has."""

import pytest
import torch
from torch import Tensor

from moe.balance import AdaptiveL1
from moe.errors import ConfigError
from moe.types import Routing
from tests.balance.decisions import gradient, step_counts


def relu_decision(num_tokens=30, num_experts=6, mask=None) -> tuple[Routing, Tensor]:
    """Each token goes to all experts of positive score, so their number varies."""
    logits = torch.randn(num_tokens, num_experts, dtype=torch.float64, requires_grad=True)
    scores = logits.relu()
    ids = torch.arange(num_experts, dtype=torch.int32).expand(num_tokens, -1)
    ids = ids.masked_fill(scores == 0, -1)
    if mask is not None:
        ids = ids.masked_fill(~mask[:, None], -1)
    return Routing(ids, scores.where(ids >= 0, 0.0), scores, logits, mask), logits


@pytest.mark.parametrize("masked", [False, True])
def test_against_loops(masked):
    mask = torch.arange(30) % 4 != 1 if masked else None
    routing, logits = relu_decision(mask=mask)
    rows = [t for t in range(30) if mask is None or mask[t]]
    counts = [sum(bool(routing.scores[t, e] > 0) for t in rows) for e in range(6)]
    expected = sum(
        0.25 * 6 * counts[e] / sum(counts) * routing.scores[t, e] / len(rows) for t in rows for e in range(6)
    )
    loss = AdaptiveL1()(routing, torch.tensor([0.25]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_at_balance_it_is_the_l1_norm():
    scores = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    ids = torch.tensor([[0, -1], [1, -1]], dtype=torch.int32)
    routing = Routing(ids, torch.tensor([[3.0, 0.0], [3.0, 0.0]]), scores, scores)
    assert AdaptiveL1()(routing, torch.ones(1)).item() == 3.0  # a token's scores sum to 3


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_that_counts_gives_zero_and_finite_gradients(num_tokens):
    routing, logits = relu_decision(num_tokens, mask=torch.zeros(num_tokens, dtype=torch.bool))
    value = AdaptiveL1()(routing, torch.ones(1))
    assert value.item() == 0
    assert (gradient(value, logits) == 0).all()


@pytest.mark.parametrize(
    ("counts", "factor"),
    [
        ([9, 8, 8], 1.2),  # 25 assignments of 12 tokens: more than 2 a token, not sparse enough
        ([8, 8, 8], 1.0),
        ([8, 8, 7], 1 / 1.2),
        ([0, 0, 0], 1 / 1.2),
    ],
)
def test_the_strength_follows_the_papers_rule(counts, factor):
    loss = AdaptiveL1(strength=0.5)
    state = loss.initial_state()
    assert state.dtype == torch.float32
    assert state.tolist() == [0.5]
    moved = loss.updated(state, step_counts(counts, top_k=2, tokens=12))
    assert moved.item() == pytest.approx(0.5 * factor)
    assert moved.dtype == torch.float32


def test_the_sign_is_decided_in_integers():
    """One assignment too many of 2^25: as float32 the two are equal."""
    counts = [2**24 + 1, 2**24]
    state = AdaptiveL1().updated(torch.ones(1), step_counts(counts, top_k=1, tokens=2**25))
    assert state.item() > 1


def test_nothing_moves_where_no_token_counts():
    state = torch.full((1,), 0.3)
    assert torch.equal(AdaptiveL1().updated(state, step_counts([0, 0], top_k=1, tokens=0)), state)


def test_the_strength_never_sticks_at_zero_nor_overflows():
    loss = AdaptiveL1(growth=1e20)
    state = loss.initial_state()
    for counts in ([0, 0], [20, 20]):
        for _ in range(4):
            state = loss.updated(state, step_counts(counts, top_k=1, tokens=10))
            assert state.isfinite()
            assert state > 0
    assert state.item() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength=-1 must be positive"),
        ({"growth": 0}, "growth=0 must be positive"),
        ({"growth": 1}, "growth=1 must be above 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        AdaptiveL1(**options)
