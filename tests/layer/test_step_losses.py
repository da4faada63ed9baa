"""Losses over a whole step: one process that holds the batch is the judge of every way to split it."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe
from moe import ScoreBias, SquaredDeviation, SwitchLoss
from moe.errors import ConfigError
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.local_ranks import run_local
from tests.support.checkpointed import KINDS, Model, gradients

GLOBAL = (SwitchLoss(0.3, scope="global"), SquaredDeviation(0.2, scope="global"), ScoreBias(0.25))
TOKENS = 48


def batch_and_mask():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, 8, dtype=torch.float64, generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.8
    return (x + x[:1]).requires_grad_(), mask  # uneven: all tokens lean one way


def step(model, batches, masks, *, ahead):
    """The balance loss alone, accumulated; its mean, the gradients and the load."""
    if ahead:
        with moe.count_ahead(model):
            for batch, mask in zip(batches, masks):
                model(batch, mask)
    total = 0.0
    for batch, mask in zip(batches, masks):
        y = model(batch, mask)
        loss = moe.balance_loss(model) / len(batches)
        (loss + 0 * y.sum()).backward()
        total += loss.item()
    return total, gradients(model), moe.balance_step(model)["moe"]


def same(found, expected):
    (loss, grads, load), (expected_loss, expected_grads, expected_load) = found, expected
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert torch.equal(load.tokens_per_expert, expected_load.tokens_per_expert)
    for name, grad in expected_grads.items():
        scale = max(grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            grads[name], grad, rtol=0, atol=1e-13 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@given(st.lists(st.integers(1, TOKENS - 1), max_size=4, unique=True), st.booleans(), st.sampled_from(list(KINDS)))
@settings(max_examples=8)
def test_any_split_into_micro_batches_is_the_whole_batch(cuts, masked, kind):
    x, mask = batch_and_mask()
    mask = mask if masked else torch.ones(TOKENS, dtype=torch.bool)
    bounds = [0, *sorted(cuts), TOKENS]
    whole, model = Model(balance=GLOBAL), Model(kind, balance=GLOBAL)
    expected = step(whole, [x], [mask], ahead=False)
    assert expected[1]["moe.router.weight"].abs().max() > 1e-4
    parts = [slice(*pair) for pair in pairwise(bounds)]
    same(step(model, [x[p] for p in parts], [mask[p] for p in parts], ahead=True), expected)
    assert torch.equal(model.moe.router.score_bias, whole.moe.router.score_bias)


def test_without_the_announcement_a_micro_batch_knows_those_before_it():
    """The running share of Qiu et al.: exact in the last micro-batch, the call's own in the first."""
    x, _ = batch_and_mask()
    model, alone = (Model(balance=(SwitchLoss(1.0, scope="global"),)) for _ in range(2))
    halves = [x[:20], x[20:]]
    losses = []
    for half in halves:
        model(half)
        losses.append(moe.balance_loss(model).item())
    first, second = (alone.moe.router(alone.first(half)) for half in halves)
    counts = first.tokens_per_expert() + second.tokens_per_expert()
    probability = (second.scores / second.scores.sum(-1, keepdim=True)).mean(0)
    assert losses[1] == pytest.approx((6 * (counts.double() / counts.sum()) * probability).sum().item(), rel=1e-12)
    assert losses[0] == pytest.approx(SwitchLoss()(first).item(), rel=1e-12)


def test_a_loss_over_the_call_is_another_one():
    """What the scope changes: two halves that lean opposite ways are even together."""
    even = torch.eye(2, dtype=torch.float64)
    values = {}
    for scope in ("call", "global"):
        layer = moe.MoE(2, 4, 2, 1, balance=(SquaredDeviation(1.0, scope=scope),)).double()
        with torch.no_grad():
            layer.router.weight.copy_(even)
        with moe.count_ahead(layer):
            layer(even[:1]), layer(even[1:])
        values[scope] = []
        for token in (even[:1], even[1:]):
            layer(token)
            values[scope].append(moe.balance_loss(layer).item())
        moe.balance_step(layer)
    assert values["global"] == [0, 0]
    assert values["call"] == [1, 1]


def spread_step(ranks, splits, ahead):
    """On a rank: its share of the batch in micro-batches; loss, gradients of the router, counts, bias."""
    mesh = ParallelMesh(Degrees.parse(f"dp_shard={ranks}"))
    x, mask = batch_and_mask()
    model = Model(balance=GLOBAL)
    parallel = parallelize(model, mesh)
    size = TOKENS // ranks
    start = mesh.data_rank * size
    bounds = [start, *(start + cut for cut in splits), start + size]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    loss, _, load = step(model, [x[p] for p in parts], [mask[p] for p in parts], ahead=ahead)
    grads = {name: p.grad.full_tensor() for name, p in parallel.named_parameters() if "experts" not in name}
    return loss, grads, load, model.moe.router.score_bias


@pytest.mark.parametrize(("ranks", "splits"), [(2, (5, 17)), (4, ()), (4, (7,))])
def test_ranks_and_micro_batches_are_the_whole_batch(ranks, splits):
    x, mask = batch_and_mask()
    whole = Model(balance=GLOBAL)
    loss, grads, load = step(whole, [x], [mask], ahead=False)
    # One micro-batch a rank needs no announcement.
    found = run_local(spread_step, ranks, (ranks, splits, bool(splits)), timeout=60)
    assert sum(each[0] for each in found) / ranks == pytest.approx(loss, rel=1e-12)
    for _, their_grads, their_load, bias in found:
        same((loss, their_grads, their_load), (loss, {name: grads[name] for name in their_grads}, load))
        assert torch.equal(bias, whole.moe.router.score_bias)


def test_wrong_announcements_are_named():
    x, _ = batch_and_mask()
    model = Model(balance=GLOBAL)
    with pytest.raises(ConfigError, match="evaluation mode"), moe.count_ahead(model.eval()):
        pass
    model.train()
    with moe.count_ahead(model):
        model(x)
    with pytest.raises(ConfigError, match="called twice"), moe.count_ahead(model):
        pass
    with pytest.raises(ConfigError, match="repeated 0 of 1 decisions"):
        moe.balance_step(model)
    with pytest.raises(ValueError, match="planted"), moe.count_ahead(model):
        raise ValueError("planted")
    assert model.moe.script is None


def test_an_announcement_that_fails_leaves_no_layer_announcing():
    model = Twins()
    model.layers[1].eval()
    with pytest.raises(ConfigError, match="evaluation mode"), moe.count_ahead(model):
        pass
    model.train()
    model(batch_and_mask()[0])
    moe.balance_loss(model)
    assert set(moe.balance_step(model)) == {"layers.0", "layers.1"}


def test_a_skipped_step_ends_what_was_announced():
    x, _ = batch_and_mask()
    model = Twins()
    with moe.count_ahead(model):
        model(x)
        model(x)
    model(x)
    moe.balance_loss(model)
    assert set(moe.balance_step(model, skipped=True)) == {"layers.0", "layers.1"}
    assert all(layer.script is None and layer.balancer.planned is None for layer in model.layers)


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_a_loss_over_sequences_takes_an_empty_batch(shape):
    layer = moe.MoE(8, 8, 6, 2, balance=(SwitchLoss(0.1, scope="sequence"),))
    x = torch.randn(shape, requires_grad=True)
    (layer(x).sum() + moe.balance_loss(layer)).backward()
    assert x.grad.shape == shape
    assert (layer.router.weight.grad == 0).all()


class Twins(nn.Module):
    """Two layers with losses over the step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(moe.MoE(8, 8, 6, 2, balance=GLOBAL) for _ in range(2))
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def count_reductions(ranks):
    import torch.distributed as dist

    model = Twins()
    parallelize(model, ParallelMesh(Degrees.parse(f"dp_replicate={ranks}")))
    calls, inner = [], dist.all_reduce

    def counted(tensor, *args, **options):
        calls.append(tensor.dtype)
        return inner(tensor, *args, **options)

    dist.all_reduce = counted
    model(batch_and_mask()[0])
    moe.balance_loss(model)
    in_loss = len(calls)
    moe.balance_step(model)
    return in_loss, len(calls) - in_loss


def test_all_layers_share_one_reduction():
    assert run_local(count_reductions, 2, (2,), timeout=60) == [(1, 1)] * 2


COMPILED = """
import torch, moe

layer = moe.MoE(8, 8, 6, 2, balance=(moe.SwitchLoss(0.1, scope="global"),))
compiled, x = torch.compile(layer, backend="eager"), torch.randn(12, 8)
torch._dynamo.config.error_on_recompile = False
torch._dynamo.config.fail_on_recompile_limit_hit = True
for _ in range(6):
    with moe.count_ahead(layer):
        for part in x.split(1):
            compiled(part)
    for part in x.split(1):
        compiled(part)
        moe.balance_loss(layer).backward()
    assert moe.balance_step(layer)[""].tokens == 12
"""


def test_an_announced_step_does_not_compile_a_layer_for_each_micro_batch():
    """In a process of its own: the checks of annotations cannot be traced."""
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr[-2000:]
