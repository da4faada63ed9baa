"""The look-ahead rule: margins of a sample under the router's new weight, and what is made of them."""

import pytest
import torch

import moe
from moe.balance import LookaheadBias, StepCounts
from moe.errors import ConfigError
from moe.kernels.margins import BINS, bin_edges, bin_of, count_margins, quantile
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.local_ranks import run_local


def layer_of(seed=0, **options):
    torch.manual_seed(seed)
    rule = LookaheadBias(**options)
    return moe.MoE(8, 4, 6, 2, router="sigmoid", balance=[rule])


def expected_bias(layer, batches, gain):
    """By hand: every token decided anew with the weight and the bias of now, margins binned, quantile, a part of it."""
    counts = torch.zeros(6, BINS, dtype=torch.int32)
    with torch.no_grad():
        for x in batches:
            scores = torch.sigmoid(x @ layer.router.weight.T)
            biased = scores + layer.router.score_bias
            ids = biased.argsort(-1, descending=True)[:, :2]
            best = biased.scatter(1, ids, -torch.inf).amax(-1, keepdim=True)
            bins = bin_of(best - biased)
            for e in range(6):
                counts[e] += torch.bincount(bins[:, e], minlength=BINS).int()
    move = quantile(counts, 2 / 6)
    bias = layer.router.score_bias + gain * move
    return bias - bias.mean()


def test_the_bias_is_that_of_the_new_weight_and_the_gain_falls():
    layer, batches = layer_of(gain=0.4, slowdown=1.0), [torch.randn(30, 8) + 0.5, torch.randn(20, 8) + 0.5]
    for step, gain in enumerate((1.0, 0.5, 0.4)):
        for x in batches:
            layer(x)
        with torch.no_grad():  # the optimizer's step
            layer.router.weight.add_(0.3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(step)))
        expected = expected_bias(layer, batches, gain)
        moe.balance_step(layer)
        torch.testing.assert_close(layer.router.score_bias, expected, rtol=0, atol=1e-6)
        assert layer.balancer.bias_state[0, 0] == step + 1


def test_a_sample_is_spread_over_the_call_and_padding_is_left_out():
    layer, x = layer_of(sample=8), torch.randn(31, 8)
    mask = torch.arange(31) % 4 != 0  # of tokens 0, 4, 8, ... none counts
    layer(x, mask)
    (found,) = layer.balancer.sample.take()
    assert torch.equal(found[0], x.where(mask[:, None], 0.0)[::4])
    assert not found[1].any()
    layer(x, mask)
    before = layer.router.score_bias.clone()
    moe.balance_step(layer)
    assert torch.equal(layer.router.score_bias, before)  # nothing that counts was kept


def test_it_balances_a_fixed_batch_in_few_steps():
    layer, x = layer_of(), torch.randn(400, 8) + torch.linspace(-1, 1, 8)
    loads = []
    for _ in range(12):
        layer(x)
        loads.append(moe.balance_step(layer)[""].max_vio.item())
    assert loads[0] > 0.9
    assert max(loads[6:]) < 0.1


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_without_a_call_and_a_skipped_one_move_nothing(skipped):
    layer = layer_of()
    if skipped:
        layer(torch.randn(30, 8))
    moe.balance_step(layer, skipped=skipped)
    assert (layer.router.score_bias == 0).all()
    assert (layer.balancer.bias_state == 0).all()
    assert layer.balancer.sample.take() == []


def test_state_survives_a_checkpoint_and_a_cast():
    layer = layer_of()
    layer(torch.randn(30, 8))
    moe.balance_step(layer)
    other = layer_of(seed=1).to(torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert other.balancer.bias_state.dtype == other.router.score_bias.dtype == torch.float32
    assert torch.equal(other.balancer.bias_state, layer.balancer.bias_state)
    other.balancer.reset_parameters()
    assert (other.balancer.bias_state == 0).all()


def spread(spec, rows):
    """On a rank: its part of the tokens, a step of the bias."""
    mesh = ParallelMesh(Degrees.parse(spec))
    layer = layer_of()
    parallelize(layer, mesh)
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    layer(x[mesh.data_rank * rows : (mesh.data_rank + 1) * rows])
    moe.balance_step(layer)
    return layer.router.score_bias


@pytest.mark.parametrize(("spec", "rows"), [("dp_shard=2", 24), ("dp_replicate=2", 24), ("dp_shard=2,tp=2", 24)])
def test_ranks_find_the_bias_of_one_process(spec, rows):
    alone = layer_of()
    alone(torch.randn(48, 8, generator=torch.Generator().manual_seed(1)) + 0.5)
    moe.balance_step(alone)
    assert alone.router.score_bias.abs().max() > 0.01
    for found in run_local(spread, Degrees.parse(spec).world_size, (spec, rows), timeout=60):
        torch.testing.assert_close(found, alone.router.score_bias, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_named():
    for options in ({"gain": 1.5}, {"gain": 0.0}, {"slowdown": -1.0}, {"sample": 0}):
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name}="):
            LookaheadBias(**options)
    counts = StepCounts(torch.ones(4, dtype=torch.int64), torch.tensor(2), 2)
    with pytest.raises(ConfigError, match="counts.margins=None"):
        LookaheadBias().updated(torch.zeros(4), torch.zeros(1, 4), counts)
    with pytest.raises(ConfigError, match="num_groups=2 beside LookaheadBias"):
        moe.MoE(8, 4, 4, 1, router={"name": "sigmoid", "num_groups": 2, "top_groups": 1}, balance=[LookaheadBias()])


def test_edges_hold_the_quantile():
    """What the rule relies on: the move lies in the bin where the share is reached."""
    scores = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    ids = scores.argsort(-1, descending=True)[:, :2].int()
    counts = count_margins(scores, ids, torch.zeros(6))
    found = quantile(counts, 1 / 3)
    place = (counts.cumsum(1) >= counts.sum(1, keepdim=True) / 3).int().argmax(1)
    edges = bin_edges()
    assert ((edges[place] <= found) & (found <= edges[place + 1])).all()
