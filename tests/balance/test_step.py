"""The end of a step: what is counted, what is forgotten, and what is said about it."""

import copy
import pickle
import warnings

import pytest
import torch

import moe
from moe.errors import DtypeError
from tests.support.checkpointed import CHECKPOINTED, Model, tokens, train_step


def test_evaluation_keeps_nothing_and_counts_apart():
    model = Model().eval()
    with torch.no_grad():
        model(tokens())
    assert not model.moe.calls.open_calls()
    assert moe.balance_loss(model).item() == 0
    assert moe.balance_step(model) == {}
    assert moe.take_evaluation_load(model)["moe"].tokens == 40
    assert moe.take_evaluation_load(model) == {}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_checkpointing_in_evaluation_mode_counts_once(kind):
    model = Model(kind).eval()
    model(tokens()).sum().backward()
    assert moe.take_evaluation_load(model)["moe"].tokens == 40


def test_losses_that_nobody_collects_are_reported():
    model = Model()
    model(tokens())
    with pytest.warns(UserWarning, match="1 balance losses of layer 'moe' were never collected"):
        moe.balance_step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe.balance_step(model)


def test_hundreds_of_uncollected_losses_are_reported_and_let_go():
    layer = moe.MoE(4, 4, 2, 1, balance=[moe.SquaredDeviation()])
    for _ in range(64):
        layer(torch.zeros(1, 4))
    with pytest.warns(UserWarning, match=r"64 forward passes in training mode without moe\.balance_loss"):
        layer(torch.zeros(1, 4))


def test_a_skipped_step_moves_no_bias():
    model = Model()
    train_step(model, [tokens()])
    before = model.moe.router.score_bias.clone()
    model(tokens())
    moe.balance_loss(model)
    assert moe.balance_step(model, skipped=True)["moe"].tokens == 40
    assert torch.equal(model.moe.router.score_bias, before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_layer_with_open_calls_can_be_copied(duplicate):
    model = Model()
    y = model(tokens())
    other = duplicate(model)
    assert not other.moe.calls.open_calls()
    assert moe.balance_step(other) == {}
    assert torch.equal(other(tokens()), y)


def test_the_bias_moves_by_the_counts_of_the_whole_step():
    """Two micro-batches that lean opposite ways: together they are even, so only their sum moves nothing."""
    layer = moe.MoE(2, 4, 2, 1, router="sigmoid", balance=[moe.ScoreBias(0.5)])
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2))
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for batch in (left.repeat(3, 1), right.repeat(3, 1)):
        layer(batch)
    assert moe.balance_step(layer)[""].tokens_per_expert.tolist() == [3, 3]
    assert layer.router.score_bias.tolist() == [0, 0]
    for batch in (left.repeat(3, 1), right.repeat(2, 1)):
        layer(batch)
    moe.balance_step(layer)
    assert layer.router.score_bias.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_call_that_fails_on_the_way_has_not_happened(monkeypatch, dtype):
    """Out of memory in the experts, or tokens of the wrong dtype: the retry is counted, the failure is not."""
    model = Model(balance=[moe.SquaredDeviation(0.1)])
    if dtype == torch.float64:

        def fail(*_):
            raise torch.OutOfMemoryError("planted")

        with monkeypatch.context() as patch:
            patch.setattr(model.moe.experts, "forward", fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(tokens())
    else:
        with pytest.raises(DtypeError):
            model.moe(torch.randn(40, 8))
    model(tokens())
    once = moe.balance_loss(model)
    assert moe.balance_step(model)["moe"].tokens == 40
    torch.testing.assert_close(once, Model(balance=[moe.SquaredDeviation(0.1)]).loss_of(tokens()))
