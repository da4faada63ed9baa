"""Recomputation: one decision, one count and one loss a call, whatever activation checkpointing does."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe
from moe import SquaredDeviation
from moe.errors import RecomputationError
from moe.routing import SoftmaxRouter
from tests.support.checkpointed import CHECKPOINTED, KINDS, Model, gradients, tokens, train_step


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("capacity_factor", [None, 0.8])
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_nothing(kind, capacity_factor, masked):
    batches = [tokens(40, 1), tokens(25, 2), tokens(40, 3)]
    masks = [torch.arange(len(b)) % 4 != 0 for b in batches] if masked else None
    plain = Model(capacity_factor=capacity_factor)
    other = Model(kind, capacity_factor=capacity_factor)
    expected, found = train_step(plain, batches, masks), train_step(other, batches, masks)
    assert found[0] == expected[0]
    for name, grad in expected[1].items():
        assert grad.abs().max() > 0, name
        # Recomputation repeats the same operations on the same numbers.
        assert torch.equal(found[1][name], grad), name
    assert torch.equal(found[2].tokens_per_expert, expected[2].tokens_per_expert)
    assert found[2].dropped == expected[2].dropped
    assert torch.equal(other.moe.router.score_bias, plain.moe.router.score_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_exact(kind):
    """Counted by hand from the router, over accumulation and padding."""
    model = Model(kind)
    batches, masks = [tokens(40, 1), tokens(25, 2)], [torch.arange(40) < 30, torch.arange(25) < 20]
    expected = torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        for batch, mask in zip(batches, masks):
            ids = model.moe.router(model.first(batch)).expert_ids
            expected += torch.bincount(ids[mask].flatten(), minlength=6)
    _, _, stats = train_step(model, batches, masks)
    assert torch.equal(stats.tokens_per_expert, expected)
    assert stats.tokens_per_expert.sum() == (30 + 20) * 2
    assert stats.tokens == 30 + 20
    assert model.runs == (2 if kind == "plain" else 4)
    assert moe.balance_step(model) == {}


@pytest.mark.parametrize("kind", CHECKPOINTED)
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_recomputation_replays_the_decision_it_would_not_make_again(kind, in_flight):
    """Noise in the recomputation flips decisions; the first ones stand, whichever call is recomputed first."""
    model = Model(kind, capacity_factor=0.9)
    batches = [tokens(40, seed) for seed in range(in_flight)]
    outputs = []
    for batch in batches:
        model.runs = 0
        outputs.append(model(batch))
    decided = [(call.chosen.clone(), call.kept.clone()) for call in model.moe.calls.open_calls()]
    extra = moe.balance_loss(model)
    replayed = []
    inner = model.moe.experts.forward
    model.moe.experts.forward = lambda x, routing: (replayed.append(routing.expert_ids.clone()), inner(x, routing))[1]
    model.runs, model.noise = 1, torch.randn(8, generator=torch.Generator().manual_seed(7)).double() * 0.15

    def body(x, mask=None, original=model.body):
        model.runs = 1  # so that each recomputation is noisy
        return original(x, mask)

    model.body = body
    with torch.no_grad():
        fresh = [model.moe.router(model.first(b) + model.noise).expert_ids for b in batches]
    assert all((f != d[0]).any() for f, d in zip(fresh, decided)), "the noise must flip something"
    (sum(y.square().mean() for y in outputs) + extra).backward()
    assert len(replayed) == in_flight
    for ids in replayed:
        assert any(torch.equal(ids, kept) for _, kept in decided)
    assert len({ids.numpy().tobytes() for ids in replayed}) == in_flight
    total = sum(torch.bincount(chosen.flatten(), minlength=6) for chosen, _ in decided)
    assert torch.equal(moe.balance_step(model)["moe"].tokens_per_expert, total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_backward_in_any_order(kind, order):
    """Pipeline schedules hold several calls in flight and run their backward passes in an order of their own."""
    batches = [tokens(30, seed) for seed in range(3)]
    reference = Model()
    for batch in batches:
        y = reference(batch)
        (y.square().mean() + moe.balance_loss(reference)).backward()
    model = Model(kind)
    losses = []
    for batch in batches:
        losses.append((y := model(batch)).square().mean() + moe.balance_loss(model))
    for index in order:
        losses[index].backward()
    for name, grad in gradients(reference).items():
        # Only the order of the three additions differs.
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("outer", CHECKPOINTED)
@pytest.mark.parametrize("inner", CHECKPOINTED)
def test_nested_checkpointing_of_both_kinds(outer, inner):
    plain, model = Model(), Model(inner)
    batch = tokens()
    y = checkpoint(lambda x: model(x) * 2, batch, use_reentrant=KINDS[outer])
    (y.square().mean() + moe.balance_loss(model)).backward()
    ((plain(batch) * 2).square().mean() + moe.balance_loss(plain)).backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name
    assert moe.balance_step(model)["moe"].tokens == 40


def test_a_reentrant_call_is_closed_by_its_recomputation():
    """So that the next micro-batch has one open call, and nothing to compare."""
    model = Model("reentrant")
    for seed in range(3):
        loss = model(tokens(40, seed)).square().mean() + moe.balance_loss(model)
        assert len(model.moe.calls.open_calls()) == 1
        loss.backward()
        del loss
        assert not model.moe.calls.open_calls()


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_a_layer_used_twice_in_one_region(kind):
    plain, model = Model(), Model()
    batch = tokens()
    twice = lambda m: lambda x: m.moe(m.moe(m.first(x)) + x)  # noqa: E731
    (twice(plain)(batch).square().mean() + moe.balance_loss(plain)).backward()
    y = checkpoint(twice(model), batch, use_reentrant=KINDS[kind])
    (y.square().mean() + moe.balance_loss(model)).backward()
    for name in ("first.weight", "moe.router.weight", "moe.experts.up_weight"):
        assert torch.equal(gradients_of(model, name), gradients_of(plain, name)), name


def gradients_of(model, name):
    return dict(model.named_parameters())[name].grad


def test_forward_calls_before_one_backward_are_averaged_by_their_tokens():
    model = Model(balance=(SquaredDeviation(0.1),))
    sizes = (10, 30)
    values = []
    for size in sizes:
        model(tokens(size, size))
        values.append(moe.balance_loss(model))
    for size in sizes:
        model(tokens(size, size))
    together = moe.balance_loss(model)
    torch.testing.assert_close(together, (values[0] * 10 + values[1] * 30) / 40)
    assert moe.balance_loss(model).item() == 0


def test_reentrant_says_so_if_the_balance_loss_comes_too_late():
    model = Model("reentrant")
    y = model(tokens())
    extra = moe.balance_loss(model)
    with pytest.raises(RecomputationError, match="call backward\\(\\) once"):
        y.square().mean().backward()
    del extra


def test_reentrant_without_the_balance_loss_trains_without_it():
    plain, model = Model(balance=()), Model("reentrant")
    for m in (plain, model):
        m(tokens()).square().mean().backward()
    for name, grad in gradients(plain).items():
        assert torch.equal(gradients(model)[name], grad), name


def test_a_call_that_was_never_made_is_noticed():
    model = Model("reentrant")
    y = model(tokens())
    model.moe.calls.end_step()  # as if the step had ended before its backward pass
    with pytest.raises(
        RecomputationError,
        match=r"recomputes a call of 40 tokens that this layer has no record of: moe.balance_step was called before",
    ):
        y.sum().backward()


def test_a_decision_that_agrees_with_no_call_is_noticed():
    model = Model("nonreentrant")
    outputs = [model(tokens(40, seed)) for seed in range(2)]
    with torch.no_grad():
        model.moe.router.weight.neg_()  # the best experts become the worst
    with pytest.raises(RecomputationError, match="agree with none of them"):
        outputs[0].sum().backward()


def test_calls_do_not_outlive_their_graph():
    model = Model()
    for _ in range(3):
        y = model(tokens())
        moe.balance_loss(model)
        assert len(model.moe.calls.open_calls()) == 1
        del y
    assert not model.moe.calls.open_calls()


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_calls_that_chose_alike_and_dropped_differently_are_told_apart(kind):
    """A collapsed router: every call sends all tokens to expert 0, and its capacity keeps other tokens each time."""
    options = {"capacity_factor": 0.5, "balance": ()}
    plain, model = Model(**options), Model(kind, **options)
    for m in (plain, model):
        with torch.no_grad():
            m.moe.router.weight.zero_()
            m.moe.router.weight[0] = 0.01
            m.first.bias.fill_(3.0)
    batches = [tokens(30, seed) for seed in range(4)]
    found = [batch.detach().clone().requires_grad_() for batch in batches]
    sum(plain(batch).square().sum() for batch in batches).backward()
    sum(model(batch).square().sum() for batch in found).backward()
    for mine, theirs in zip(found, batches):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_recomputation_in_evaluation_takes_no_call_of_training():
    layer, other = moe.MoE(8, 16, 6, 2).double(), tokens(40, 2)
    expected = torch.autograd.grad(layer.eval()(other).square().sum(), other)[0]
    layer.train()
    still_open = layer(tokens(40, 1))
    layer.eval()
    found = torch.autograd.grad(checkpoint(layer, other, use_reentrant=False).square().sum(), other)[0]
    assert torch.equal(found, expected)
    checkpoint(layer, other, use_reentrant=True).square().sum().backward()
    assert torch.equal(other.grad, expected)
    del still_open


class NoisyRouter(SoftmaxRouter):
    """Selects with noise, so that it draws random numbers."""

    adds_noise = True

    def select(self, logits, scores, tokens):
        return super().select(logits + torch.randn_like(logits), scores, tokens)


@pytest.mark.parametrize("kind", [*CHECKPOINTED, "contexts"])
def test_a_router_that_draws_random_numbers_draws_them_once_in_each_run(kind):
    """Else what follows it in the region would get other ones when it is run again."""
    layer, dropout, x = moe.MoE(8, 16, 6, 2, router=NoisyRouter(8, 6, 2)).double(), nn.Dropout(0.5), tokens()
    region = lambda x: dropout(layer(x)).square().sum()  # noqa: E731
    torch.manual_seed(1)
    expected = torch.autograd.grad(region(x), x)[0]
    moe.balance_loss(layer)
    torch.manual_seed(1)
    how = {"use_reentrant": KINDS[kind]} if kind in KINDS else {"context_fn": moe.checkpoint_contexts}
    checkpoint(region, x, **{"use_reentrant": False} | how).backward()
    assert torch.equal(x.grad, expected)
