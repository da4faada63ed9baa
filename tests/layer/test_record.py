"""Decisions that are kept and repeated."""

import pytest
import torch

import moe
from moe.errors import ConfigError, DtypeError, ShapeError
from tests.support.checkpointed import CHECKPOINTED, Model, gradients, tokens


def ids_of(kept):
    return {name: [routing.expert_ids for routing in calls] for name, calls in kept.items()}


def test_a_recording_keeps_each_call_once_without_gradients():
    model = Model("nonreentrant")
    with moe.record_routing(model) as kept:
        model(tokens(40, 1)).sum().backward()
        with torch.no_grad():
            model.eval()(tokens(7, 2))
    model(tokens(5, 3))
    assert [len(routing.expert_ids) for routing in kept["moe"]] == [40, 7]
    assert not kept["moe"][0].scores.requires_grad
    assert torch.equal(kept["moe"][0].expert_ids, model.moe.router(model.first(tokens(40, 1))).expert_ids)


@pytest.mark.parametrize("kind", ["plain", *CHECKPOINTED])
def test_another_router_under_recorded_decisions_computes_and_learns_from_its_own_scores(kind):
    model, batches = Model(kind, balance=()), [tokens(40, 1), tokens(9, 2)]
    with moe.record_routing(model) as kept:
        expected = [model(batch) for batch in batches]
        sum(y.square().sum() for y in expected).backward()
    reference = gradients(model)
    model.zero_grad()
    with moe.replay_routing(model, ids_of(kept)):
        found = [model(batch) for batch in batches]
        sum(y.square().sum() for y in found).backward()
    for name, grad in reference.items():
        assert torch.equal(gradients(model)[name], grad), name
    with torch.no_grad():
        model.moe.router.weight.add_(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    with moe.replay_routing(model, ids_of(kept)), moe.record_routing(model) as again:
        other = [model(batch) for batch in batches]
    assert all(torch.equal(a.expert_ids, b.expert_ids) for a, b in zip(again["moe"], kept["moe"]))
    assert not torch.equal(again["moe"][0].scores, kept["moe"][0].scores)
    assert not torch.equal(other[0], expected[0])


def test_a_layer_repeats_one_recording_at_a_time():
    model = Model()
    ids = {"moe": [torch.zeros(40, 2, dtype=torch.int32)]}
    message = "layer 'moe' repeats other decisions already"
    with pytest.raises(ConfigError, match=message), moe.replay_routing(model, ids), moe.replay_routing(model, ids):
        pass


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            torch.tensor([[0, 6]], dtype=torch.int32),
            ConfigError,
            "decision 0 of layer 'moe' has ids 0 to 6; .* -1 to 5",
        ),
        (torch.tensor([[-2, 1]], dtype=torch.int32), ConfigError, "has ids -2 to 1"),
        (torch.tensor([[0, 1]]), DtypeError, "decision 0 of layer 'moe' is torch.int64"),
    ],
)
def test_ids_that_no_layer_decided_are_refused_before_any_call(ids, error, message):
    model = Model()
    with pytest.raises(error, match=message), moe.replay_routing(model, {"moe": [ids]}):
        pass
    assert model.moe.script is None


@pytest.mark.parametrize(
    ("decisions", "calls", "error", "message"),
    [
        ({"moo": []}, [], ConfigError, "decisions has layer 'moo'; the model's MoE layers are moe"),
        (
            {"moe": [40]},
            [41],
            ShapeError,
            r"recorded decision 0 has shape \(40, 2\), but the call decides on \(41, 2\)",
        ),
        ({"moe": [40]}, [40, 40], ConfigError, "all 1 recorded decisions of this layer have been repeated"),
        ({"moe": [40, 40]}, [40], ConfigError, "1 of 2 decisions of layer 'moe' are left over"),
    ],
)
def test_decisions_that_do_not_fit_are_named(decisions, calls, error, message):
    model = Model()
    ids = {name: [torch.zeros(size, 2, dtype=torch.int32) for size in sizes] for name, sizes in decisions.items()}
    with pytest.raises(error, match=message), moe.replay_routing(model, ids):
        [model(tokens(size)) for size in calls]
    assert model.moe.script is None
