"""Balance losses: values, gradients, and the traps that make a coefficient do nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moe
from moe.balance import (
    RouterZLoss,
    ScoreBias,
    SquaredDeviation,
    SwitchLoss,
    load_share,
    make_balance,
    mean_probability,
    squared_deviation,
)
from moe.errors import ConfigError
from moe.types import Routing


def softmax_routing(num_tokens=50, num_experts=8, top_k=2, mask=None, sigmoid=False, seed=0, skew=1.0):
    """A decision whose logits are leaves, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = (logits + skew * torch.arange(num_experts) / num_experts).requires_grad_()
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    ids = logits.topk(top_k, -1).indices.int()
    weights = scores.gather(1, ids.long())
    if mask is not None:
        ids, weights = ids.masked_fill(~mask[:, None], -1), weights.masked_fill(~mask[:, None], 0.0)
    return Routing(ids, weights, scores, logits, mask), logits


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_squared_deviation_is_the_source_documents_sum():
    tokens = torch.tensor([3.0, 1.0, 0.0, 4.0])
    total, num_experts = tokens.sum(), 4
    by_hand = sum((tokens[e] / total - 1 / num_experts) ** 2 for e in range(num_experts))
    torch.testing.assert_close(squared_deviation(tokens / total), by_hand)


@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_squared_deviation_times_experts_is_the_squared_coefficient_of_variation(seed, top_k, sigmoid):
    routing, _ = softmax_routing(top_k=top_k, seed=seed, sigmoid=sigmoid)
    load = routing.tokens_per_expert().double()
    cv = load.std(correction=0) / load.mean()
    torch.testing.assert_close(SquaredDeviation()(routing), cv**2)


def test_squared_deviation_is_zero_at_balance_with_zero_gradient():
    logits = (10 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    scores = logits.softmax(-1)
    ids = torch.arange(4, dtype=torch.int32)[:, None]
    routing = Routing(ids, scores.gather(1, ids.long()), scores, logits)
    loss = SquaredDeviation()(routing)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    assert gradient(loss, logits).abs().max() < 1e-15


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_its_gradient_is_exactly_the_switch_losses(sigmoid, top_k):
    """At half the coefficient; with sigmoid scores too, since they are normalised."""
    routing, logits = softmax_routing(sigmoid=sigmoid, top_k=top_k)
    squared = gradient(0.5 * SquaredDeviation()(routing), logits)
    switch = gradient(SwitchLoss()(routing), logits)
    assert switch.abs().max() > 1e-4
    # Float64: the two differ by rounding of sums of 50 terms only.
    assert (squared - switch).abs().max() < 1e-15


def test_counts_alone_carry_no_gradient():
    routing, _ = softmax_routing()
    assert not load_share(routing).requires_grad
    assert mean_probability(routing).requires_grad


def test_the_gradient_lowers_the_load_of_the_busiest_expert():
    routing, logits = softmax_routing(num_tokens=400, skew=3.0)
    busiest = int(routing.tokens_per_expert().argmax())
    mean_gradient = gradient(SquaredDeviation()(routing), logits).mean(0)
    assert int(mean_gradient.argmax()) == busiest  # descent lowers this logit most
    assert mean_gradient[busiest] > 0


def test_switch_loss_formula():
    routing, _ = softmax_routing(num_experts=6, top_k=2)
    f = torch.stack([(routing.expert_ids == e).sum() for e in range(6)]) / (50 * 2)
    torch.testing.assert_close(SwitchLoss()(routing), 6 * (f * routing.scores.mean(0)).sum())


def test_z_loss_formula():
    routing, logits = softmax_routing()
    torch.testing.assert_close(RouterZLoss()(routing), (logits.exp().sum(-1).log() ** 2).mean())


@pytest.mark.parametrize(
    "loss", [SquaredDeviation(), SwitchLoss(), RouterZLoss()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_padding_counts_nowhere(loss, sigmoid):
    mask = torch.arange(50) % 3 != 0
    padded, logits = softmax_routing(mask=mask, sigmoid=sigmoid)
    keep = [t[mask] for t in (padded.expert_ids, padded.weights, padded.scores, padded.logits)]
    alone = Routing(*keep)
    torch.testing.assert_close(loss(padded), loss(alone))
    grad = gradient(loss(padded), logits)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).any()


@pytest.mark.parametrize(
    "loss", [SquaredDeviation(), SwitchLoss(), RouterZLoss()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_token_that_counts_gives_zero_and_finite_gradients(loss, num_tokens):
    routing, logits = softmax_routing(num_tokens=num_tokens, mask=torch.zeros(num_tokens, dtype=torch.bool))
    value = loss(routing)
    assert value.item() == 0
    assert (gradient(value, logits) == 0).all()


def test_bias_moves_by_the_rate_towards_balance():
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0])
    moved = ScoreBias(rate=0.25).updated(bias, torch.tensor([9, 1, 5, 5]))
    assert moved.tolist() == [-0.25, 0.75, -0.5, 0.0]  # mean 5: too many, too few, just right, just right


def test_bias_compares_in_integers():
    """Counts whose mean is no float32: 3 experts, 2^24 + 1 assignments each, but for one."""
    counts = torch.full((3,), 2**24 + 1)
    assert ScoreBias(1.0).updated(torch.zeros(3), counts).tolist() == [0, 0, 0]
    counts[0] += 1
    assert ScoreBias(1.0).updated(torch.zeros(3), counts).tolist() == [-1, 1, 1]


def test_terms_by_name_and_by_object():
    losses, bias = make_balance(
        {"squared_deviation": {"coefficient": 0.1}, "score_bias": {"rate": 0.5}, "router_z": None}
    )
    assert losses == (SquaredDeviation(0.1), RouterZLoss())
    assert bias == ScoreBias(0.5)
    assert make_balance([SwitchLoss()]) == ((SwitchLoss(),), None)
    assert make_balance(()) == make_balance({}) == ((), None)


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"swich": {}}, "balance='swich' is unknown.*did you mean 'switch'"),
        ({"switch": {"coeficient": 1}}, "balance='switch' does not take these options.*coeficient"),
        ([ScoreBias(), ScoreBias()], "2 score biases"),
        (["switch"], "balance='switch' is neither"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_terms_are_named(balance, message):
    with pytest.raises(ConfigError, match=message):
        moe.MoE(8, 8, 4, balance=balance)


@pytest.mark.parametrize("term", [SquaredDeviation, SwitchLoss, RouterZLoss, ScoreBias])
def test_coefficients_must_be_positive(term):
    with pytest.raises(ConfigError, match="=-1 must be positive"):
        term(-1)
