"""Balance losses made of shares: values, gradients, scopes, and the traps that make a coefficient do nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.balance import (
    RouterZLoss,
    Scope,
    SquaredDeviation,
    SwitchLoss,
    count_tokens,
    load_share,
    mean_probability,
    probability_sum,
    squared_deviation,
)
from moe.errors import ConfigError
from moe.types import Routing
from tests.balance.decisions import by_sequence, decision, gradient


def test_squared_deviation_is_the_source_documents_sum():
    tokens = torch.tensor([3.0, 1.0, 0.0, 4.0])
    total, num_experts = tokens.sum(), 4
    by_hand = sum((tokens[e] / total - 1 / num_experts) ** 2 for e in range(num_experts))
    torch.testing.assert_close(squared_deviation(tokens / total), by_hand)


@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_squared_deviation_times_experts_is_the_squared_coefficient_of_variation(seed, top_k, sigmoid):
    routing, _ = decision(top_k=top_k, seed=seed, sigmoid=sigmoid)
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
    routing, logits = decision(sigmoid=sigmoid, top_k=top_k)
    squared = gradient(0.5 * SquaredDeviation()(routing), logits)
    switch = gradient(SwitchLoss()(routing), logits)
    assert switch.abs().max() > 1e-4
    # Float64: the two differ by rounding of sums of 50 terms only.
    assert (squared - switch).abs().max() < 1e-15


def test_counts_alone_carry_no_gradient():
    routing, _ = decision()
    assert not load_share(routing).requires_grad
    assert mean_probability(routing).requires_grad


def test_the_gradient_lowers_the_load_of_the_busiest_expert():
    routing, logits = decision(num_tokens=400, skew=3.0)
    busiest = int(routing.tokens_per_expert().argmax())
    mean_gradient = gradient(SquaredDeviation()(routing), logits).mean(0)
    assert int(mean_gradient.argmax()) == busiest  # descent lowers this logit most
    assert mean_gradient[busiest] > 0


def test_switch_loss_formula():
    routing, _ = decision(num_experts=6, top_k=2)
    f = torch.stack([(routing.expert_ids == e).sum() for e in range(6)]) / (50 * 2)
    torch.testing.assert_close(SwitchLoss()(routing), 6 * (f * routing.scores.mean(0)).sum())


def test_z_loss_formula():
    routing, logits = decision()
    torch.testing.assert_close(RouterZLoss()(routing), (logits.exp().sum(-1).log() ** 2).mean())


@pytest.mark.parametrize(
    "loss", [SquaredDeviation(), SwitchLoss(), RouterZLoss()], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_padding_counts_nowhere(loss, sigmoid):
    mask = torch.arange(50) % 3 != 0
    padded, logits = decision(mask=mask, sigmoid=sigmoid)
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
    routing, logits = decision(num_tokens=num_tokens, mask=torch.zeros(num_tokens, dtype=torch.bool))
    value = loss(routing)
    assert value.item() == 0
    assert (gradient(value, logits) == 0).all()


def test_the_factor_of_e_makes_a_coefficient_mean_the_same_for_any_number_of_experts():
    """Half of the experts get everything: CV^2 is 1 for any E, and the source document's sum is 1/E."""
    for num_experts in (4, 64):
        load = torch.tensor([2.0, 0.0] * (num_experts // 2)) / num_experts
        assert squared_deviation(load).item() == pytest.approx(1 / num_experts)
        assert SquaredDeviation().combine(load, load).item() == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_values_at_collapse(top_k):
    """The same K experts get every token: E / K - 1, and what Switch says depends on the probabilities too."""
    load = torch.tensor([1.0] * top_k + [0.0] * (8 - top_k)) / top_k
    assert SquaredDeviation().combine(load, load).item() == pytest.approx(8 / top_k - 1)
    assert SwitchLoss().combine(load, load).item() == pytest.approx(8 / top_k)
    assert SwitchLoss().combine(load, torch.full((8,), 1 / 8)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_two_gradients_agree_only_where_the_probabilities_sum_to_one(seed):
    """Raw sigmoid scores sum to anything, and both losses then push on the sum too, but not alike."""
    routing, logits = decision(num_tokens=400, sigmoid=True, skew=3.0, seed=seed)
    squared, switch = SquaredDeviation().combine, SwitchLoss().combine
    cosines = []
    for probability in (mean_probability(routing), routing.scores.mean(0)):
        pair = [gradient(loss(load_share(routing), probability), logits).flatten() for loss in (squared, switch)]
        cosines.append(torch.cosine_similarity(*pair, dim=0).item())
    assert cosines[0] == pytest.approx(1.0, abs=1e-12)
    assert cosines[1] < 0.8


def test_even_mean_probabilities_leave_hard_routing_collapsed():
    """Experts 0 and 1 win every token by a hair: the mean probabilities are as good as even, the load is not."""
    eps = 1e-3
    rows = torch.full((100, 4), 0.25, dtype=torch.float64)
    rows[:, :2] += eps
    rows[:, 2:] -= eps
    ids = rows.topk(2, -1).indices.int()
    routing = Routing(ids, rows.gather(1, ids.long()), rows, rows.log())
    of_probabilities = 4 * squared_deviation(mean_probability(routing))
    assert of_probabilities.item() < 1e-4
    assert SquaredDeviation()(routing).item() == pytest.approx(1.0)  # E / K - 1, as collapsed as it gets


MASKS = {
    "all": None,
    "padded": torch.arange(24) % 8 < torch.tensor([8, 5, 0]).repeat_interleave(8),  # whole, in part, empty
    "none": torch.zeros(24, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("num_sequences", "scope"), [(1, "call"), (3, "sequence"), (1, "sequence"), (1, "global")])
def test_shares_and_losses_against_loops(mask, sigmoid, num_sequences, scope):
    routing, logits = decision(24, 5, 2, num_sequences, mask, sigmoid)
    parts = by_sequence(routing)
    total = max(sum(count for _, _, count, _ in parts), 1)
    switch = sum(n * 5 * sum(f * p for f, p in zip(load, prob)) for load, prob, n, _ in parts) / total
    squared = sum(n * 5 * sum((f - 1 / 5) ** 2 for f in load) for load, _, n, _ in parts) / total
    surrogate = sum(
        n * 5 * sum(2 * (f - 1 / 5) * p for f, p in zip(load, prob)) for load, prob, n, _ in parts
    ) / total  # fmt: skip
    found = SwitchLoss(scope=scope)(routing)
    torch.testing.assert_close(found, torch.as_tensor(switch, dtype=torch.float64))
    found_squared = SquaredDeviation(scope=scope)(routing)
    assert found_squared.item() == pytest.approx(squared, abs=1e-15)
    if total > 1:
        torch.testing.assert_close(gradient(found, logits), gradient(switch, logits))
        torch.testing.assert_close(gradient(found_squared, logits), gradient(surrogate, logits))
    else:
        assert (gradient(found + found_squared, logits) == 0).all()


def test_a_sequence_by_itself_is_not_the_batch():
    """Two sequences that are each collapsed, on different experts, are even together."""
    ids = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)[:, None]
    scores = torch.full((6, 2), 0.5)
    routing = Routing(ids, torch.ones(6, 1), scores, scores, num_sequences=2)
    assert SquaredDeviation()(routing).item() == 0
    assert SquaredDeviation(scope="sequence")(routing).item() == 1
    assert load_share(routing, by_sequence=True).tolist() == [[1, 0], [0, 1]]
    assert count_tokens(routing, by_sequence=True).tolist() == [3, 3]


@given(st.integers(0, 100), st.integers(1, 4), st.booleans())
def test_shares_of_sequences_are_those_of_each_alone(seed, num_sequences, masked):
    mask = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.6 if masked else None
    routing, _ = decision(12, 5, 2, num_sequences, mask, seed=seed)
    load, probability = load_share(routing, by_sequence=True), mean_probability(routing, by_sequence=True)
    counts, length = count_tokens(routing, by_sequence=True), 12 // num_sequences
    for i in range(num_sequences):
        rows = slice(i * length, (i + 1) * length)
        own = [t[rows] for t in (routing.expert_ids, routing.weights, routing.scores, routing.logits)]
        alone = Routing(*own, None if mask is None else mask[rows])
        assert torch.equal(load[i], load_share(alone))
        torch.testing.assert_close(probability[i], mean_probability(alone))
        assert counts[i] == count_tokens(alone)
    torch.testing.assert_close(probability_sum(routing), mean_probability(routing) * counts.sum())


def test_a_part_of_the_mean_has_its_part_of_the_gradient():
    """In global scope each call hands over its part of the mean probability; the gradients then add up to the whole."""
    whole, logits = decision(60, 6, 2)
    for loss in (SquaredDeviation(scope="global"), SwitchLoss(scope="global")):
        parts = []
        for rows in (slice(0, 25), slice(25, 60)):
            own = [t[rows] for t in (whole.expert_ids, whole.weights, whole.scores, whole.logits)]
            parts.append(loss.combine(load_share(whole), probability_sum(Routing(*own)) / 60))
        torch.testing.assert_close(sum(gradient(part, logits) for part in parts), gradient(loss(whole), logits))


def test_one_expert_is_always_balanced():
    routing, logits = decision(num_experts=1, top_k=1)
    for scope in Scope:
        assert SquaredDeviation(scope=scope)(routing).item() == 0
        switch = SwitchLoss(scope=scope)(routing)
        assert switch.item() == pytest.approx(1.0)
        assert gradient(switch, logits).abs().max() < 1e-15


def test_no_assignment_gives_no_loss():
    """Tokens that count and chose no expert, as a router that decides the number itself may do."""
    scores = torch.zeros(3, 4, requires_grad=True)
    routing = Routing(torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2), scores, scores)
    for loss in (SquaredDeviation(), SwitchLoss()):
        value = loss(routing)
        assert value.item() == 0
        assert gradient(value, scores).isfinite().all()


def test_a_float64_layer_has_float64_shares():
    routing, _ = decision(num_tokens=3, num_experts=3, top_k=1, skew=0.0, seed=1)
    assert load_share(routing).dtype == torch.float64
    counts = routing.tokens_per_expert().tolist()
    assert load_share(routing).tolist() == [count / 3 for count in counts]


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_scope_lists_what_there_is():
    with pytest.raises(ConfigError, match="scope='batch' is unknown; choose one of call, sequence, global"):
        SwitchLoss(scope="batch")


@pytest.mark.parametrize("coefficient", [-1, 0])
@pytest.mark.parametrize("loss", [SquaredDeviation, SwitchLoss, RouterZLoss])
def test_coefficients_must_be_positive(loss, coefficient):
    with pytest.raises(ConfigError, match=f"coefficient={coefficient} must be positive"):
        loss(coefficient)
