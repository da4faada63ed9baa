"""Importance and load, the squared coefficients of variation of Shazeer et al., against loops."""

from dataclasses import replace

import pytest
import torch

from moe.balance import ImportanceLoss, LoadLoss
from moe.errors import ConfigError
from moe.types import Routing
from tests.balance.decisions import decision, gradient

MASKS = {"all": None, "padded": torch.arange(20) % 3 != 0}


def squared_variation(amounts):
    mean = sum(amounts) / len(amounts)
    return sum((amount - mean) ** 2 for amount in amounts) / len(amounts) / mean**2


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("top_k", [1, 3])
def test_importance_against_loops(mask, top_k):
    routing, logits = decision(20, 7, top_k, mask=mask, sigmoid=True)
    amounts = [torch.zeros((), dtype=torch.float64) for _ in range(7)]
    for t, experts in enumerate(routing.expert_ids.tolist()):
        for k, e in enumerate(experts):
            if e >= 0:
                amounts[e] = amounts[e] + routing.weights[t, k]
    expected, loss = squared_variation(amounts), ImportanceLoss()(routing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_load_against_loops(mask):
    routing, logits = decision(20, 7, mask=mask)
    routing = replace(routing, selection_probability=(3 * logits).sigmoid())
    rows = [t for t in range(20) if mask is None or mask[t]]
    expected = squared_variation([sum(routing.selection_probability[t, e] for t in rows) for e in range(7)])
    loss = LoadLoss()(routing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, logits), gradient(expected, logits))


def test_values_at_balance_and_at_collapse():
    ids = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    scores = torch.full((2, 4), 0.25)
    routing = Routing(ids, torch.full((2, 2), 0.5), scores, scores, selection_probability=torch.full((2, 4), 0.5))
    assert ImportanceLoss()(routing).item() == LoadLoss()(routing).item() == 0
    certain = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 4)
    ids = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    collapsed = replace(routing, expert_ids=ids, selection_probability=certain)
    assert ImportanceLoss()(collapsed).item() == LoadLoss()(collapsed).item() == 1  # E / K - 1


def test_equal_importance_may_hide_unequal_load():
    """One token of weight 1 for expert 0, two of weight 1/2 for expert 1."""
    ids = torch.tensor([[0], [1], [1]], dtype=torch.int32)
    scores = torch.full((3, 2), 0.5)
    routing = Routing(ids, torch.tensor([[1.0], [0.5], [0.5]]), scores, scores)
    assert ImportanceLoss()(routing).item() == 0
    assert routing.tokens_per_expert().tolist() == [1, 2]


@pytest.mark.parametrize("num_tokens", [0, 5])
@pytest.mark.parametrize("loss", [ImportanceLoss(), LoadLoss()], ids=lambda loss: type(loss).__name__)
def test_no_token_that_counts_gives_zero_and_finite_gradients(loss, num_tokens):
    routing, logits = decision(num_tokens=num_tokens, mask=torch.zeros(num_tokens, dtype=torch.bool))
    value = loss(replace(routing, selection_probability=logits.sigmoid()))
    assert value.item() == 0
    assert (gradient(value, logits) == 0).all()


@pytest.mark.parametrize("loss", [ImportanceLoss(), LoadLoss()], ids=lambda loss: type(loss).__name__)
def test_one_expert_is_always_balanced(loss):
    routing, logits = decision(num_experts=1, top_k=1)
    value = loss(replace(routing, selection_probability=logits.sigmoid()))
    assert value.item() == 0
    assert gradient(value, logits).abs().max() < 1e-15


def test_load_needs_a_router_with_noise():
    routing, _ = decision()
    with pytest.raises(ConfigError, match=r"balance='load' needs .* router='noisy_top_k'"):
        LoadLoss()(routing)


@pytest.mark.parametrize("loss", [ImportanceLoss, LoadLoss])
def test_coefficients_must_be_positive(loss):
    with pytest.raises(ConfigError, match="coefficient=-1 must be positive"):
        loss(-1)
