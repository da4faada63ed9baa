"""Checkpoints made with ``moe.checkpoint_contexts``: each recomputation repeats its own forward pass."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import moe
from moe.errors import RecomputationError
from tests.support.checkpointed import Model, gradients, tokens


def taped(function, *args, contexts=moe.checkpoint_contexts):
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class Noisy:
    """The body of a model whose recomputations see other tokens in the MoE layer."""

    def __init__(self, model, noise):
        self.model, self.noise = model, noise

    def __call__(self, x):
        h = self.model.first(x)
        if moe.balance.in_backward():
            h = h + self.noise
        return self.model.last(self.model.moe(h))


def replayed(model):
    """Collects the decisions that the experts get."""
    found, inner = [], model.moe.experts.forward

    def forward(x, routing):
        found.append(routing.expert_ids.clone())
        return inner(x, routing)

    model.moe.experts.forward = forward
    return found


def test_calls_that_look_alike_are_told_apart_whatever_the_recomputation_decides():
    """The same tokens in three calls, decided otherwise each time: nothing in a recomputation tells which it is."""
    model, x = Model(balance=()), tokens()
    decided = [torch.randint(6, (40, 2), generator=torch.Generator().manual_seed(seed)).int() for seed in range(3)]
    found = replayed(model)
    with moe.replay_routing(model, {"moe": decided}):
        outputs = [taped(Noisy(model, 3.0), x) for _ in decided]
    found.clear()
    for place in (1, 2, 0):
        outputs[place].sum().backward()
    assert [torch.equal(ids, decided[place]) for ids, place in zip(found, (1, 2, 0))] == [True] * 3
    assert moe.balance_step(model)["moe"].tokens == 120


def test_without_contexts_such_calls_are_refused():
    model, x = Model(balance=()), tokens()
    random = torch.Generator().manual_seed(0)
    other = torch.randint(6, (40, 2), generator=random).int()
    decided = [other, other.clone()]
    decided[1][:4] = (decided[1][:4] + 1) % 6  # two calls that decided nearly alike
    with moe.replay_routing(model, {"moe": decided}):
        outputs = [checkpoint(Noisy(model, 0.3), x, use_reentrant=False) for _ in decided]
    with pytest.raises(RecomputationError, match=r"context_fn=moe\.checkpoint_contexts"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("layers", [1, 2])
def test_values_and_gradients_are_those_without_checkpointing(layers):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.experts = nn.ModuleList(moe.MoE(8, 16, 6, 2, capacity_factor=0.9) for _ in range(layers))

        def forward(self, x):
            x = self.first(x)
            for layer in (*self.experts, *self.experts):  # each layer twice: the order within a layer counts
                x = x + layer(x)
            return self.last(x)

    plain, model, batch = Stack().double(), Stack().double(), tokens()
    for found, run in ((plain, plain), (model, functools.partial(taped, model))):
        (run(batch).square().mean() + moe.balance_loss(found)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


def test_a_region_in_a_region_and_a_graph_that_is_run_twice():
    plain, model, batch = Model(), Model(), tokens()
    for m, run in ((plain, plain), (model, lambda x: taped(lambda h: taped(model.body, h) * 1.0, x))):
        y = run(batch).square().mean() + moe.balance_loss(m)
        y.backward(retain_graph=True)
        y.backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


def test_another_context_fn_inside():
    """Selective checkpointing keeps the products; its contexts are entered within the tape's."""
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE

    inner = functools.partial(create_selective_checkpoint_contexts, policy)
    plain, model, batch = Model(), Model(), tokens()
    (plain(batch).square().mean() + moe.balance_loss(plain)).backward()
    y = taped(model.body, batch, contexts=functools.partial(moe.checkpoint_contexts, inner))
    (y.square().mean() + moe.balance_loss(model)).backward()
    assert torch.ops.aten.addmm.default in seen
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


def test_selective_checkpointing_that_keeps_routing_keeps_a_replayed_decision():
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "route" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    inner = functools.partial(create_selective_checkpoint_contexts, policy)
    plain, model, batch = Model(balance=()), Model(balance=()), tokens()
    decided = {"moe": [torch.randint(6, (40, 2), generator=torch.Generator().manual_seed(0)).int()]}
    with moe.replay_routing(plain, decided):
        plain(batch).square().mean().backward()
    with moe.replay_routing(model, decided):
        y = taped(model.body, batch, contexts=functools.partial(moe.checkpoint_contexts, inner))
    y.square().mean().backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


@pytest.mark.parametrize("crossed", [False, True])
def test_exact_recomputations_of_replayed_calls_are_told_apart_by_their_scores(crossed):
    """What they would decide themselves says nothing: each call was given the decision of the other."""
    plain, model = Model(balance=()), Model("nonreentrant", balance=())
    batches = [tokens(40, 1), tokens(40, 2)]
    decided = [model.moe.router(model.first(batch)).expert_ids for batch in batches]
    decided = decided[::-1] if crossed else decided
    for m in (plain, model):
        with moe.replay_routing(m, {"moe": decided}):
            outputs = [m(batch) for batch in batches]
        for y in outputs:
            y.square().mean().backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


def test_a_recomputation_that_calls_more_often_is_noticed():
    model, batch = Model(balance=()), tokens()

    def body(x):
        y = model.moe(model.first(x))
        return model.moe(y) if moe.balance.in_backward() else y.exp()

    with pytest.raises(RecomputationError, match="calls a layer 2 times, where the checkpointed forward pass called"):
        taped(body, batch).sum().backward()


def test_a_forward_pass_that_fails_leaves_no_tape_behind():
    model, batch = Model(balance=()), tokens()

    def body(x):
        model.moe(x)
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        taped(body, batch)
    assert moe.balance.tape._TAPES.get() == ()
