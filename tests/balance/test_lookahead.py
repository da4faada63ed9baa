"""The look-ahead rule: early by margins of a sample under the router's new weight, late by counts."""

import pytest
import torch

import moe
from moe.balance import LookaheadBias
from moe.balance.protocols import MarginRequest
from moe.balance.step_counts import StepCounts
from moe.errors import ConfigError
from moe.kernels.margins import BINS, bin_edges, bin_of, count_margins, quantile
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.local_ranks import run_local
from moe.parallel.state import gather_state, load_state


def layer_of(seed=0, **options):
    torch.manual_seed(seed)
    rule = LookaheadBias(**options)
    return moe.MoE(8, 4, 6, 2, router="sigmoid", balance=[rule])


def margins_of(scores, bias):
    """By hand: the second best of all other experts, less the expert's own."""
    biased = scores + bias
    others = biased[:, None].expand(-1, 6, -1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    return others.topk(2, -1).values[..., 1] - biased


def expected_bias(layer, batches):
    """By hand: every token decided anew with the weight and the bias of now, margins binned, their quantile."""
    counts = torch.zeros(6, BINS, dtype=torch.int32)
    with torch.no_grad():
        for x in batches:
            bins = bin_of(margins_of(torch.sigmoid(x @ layer.router.weight.T), layer.router.score_bias))
            for e in range(6):
                counts[e] += torch.bincount(bins[:, e], minlength=BINS).int()
    bias = layer.router.score_bias + quantile(counts, 2 / 6)
    return bias - bias.mean()


def test_early_the_bias_is_that_of_the_new_weight():
    layer, batches = layer_of(), [torch.randn(30, 8) + 0.5, torch.randn(20, 8) + 0.5]
    for step in range(3):
        for x in batches:
            layer(x)
        with torch.no_grad():  # the optimizer's step
            layer.router.weight.add_(0.3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(step)))
        expected = expected_bias(layer, batches)
        moe.balance_step(layer)
        torch.testing.assert_close(layer.router.score_bias, expected, rtol=0, atol=1e-6)
        assert layer.balancer.steps == step + 1


def late_move(margins, load, rate, limit):
    """By hand, of 39 tokens: 2/6 of them is 13, and half of it less and more 6.5 and 19.5."""
    ranked = margins.sort(0).values
    low, middle, high = (ranked[5] + ranked[6]) / 2, (ranked[12] + ranked[13]) / 2, ranked[19]
    spread = torch.maximum(2 * torch.minimum(middle - low, high - middle), middle.abs())
    off = 1 / 6 - load
    step = rate * spread.median() * off / off.square().mean().sqrt()
    longest = limit * spread * (6 * off).abs()
    move = step.clamp(-longest, longest)
    return move - move.mean(), move != step


def test_late_it_is_a_step_by_the_counts_in_the_measure_of_the_margins():
    layer, x = layer_of(early_steps=1, rate=0.3, limit=0.5), torch.randn(40, 8) + 0.5
    mask, limited = torch.arange(40) != 3, []
    layer(x, mask)
    moe.balance_step(layer)
    for step in range(1, 11):
        layer(x, mask)
        before = layer.router.score_bias.clone()
        if step in {1, 9}:
            margins = margins_of(torch.sigmoid(x @ layer.router.weight.T)[mask], before)
        with torch.no_grad():  # late this changes nothing before the next step
            layer.router.weight.add_(0.2 * torch.randn(6, 8))
        expected, was_limited = late_move(margins, moe.balance_step(layer)[""].load, 0.3, 0.5)
        # Bins are an eighth of an octave wide.
        atol = 0.2 * expected.abs().max().item()
        torch.testing.assert_close(layer.router.score_bias - before, expected, rtol=0, atol=atol)
        limited.append(was_limited)
    assert 0 < torch.stack(limited).float().mean() < 0.9


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_without_the_margins_that_it_asked_for_says_so(step):
    counts = StepCounts(torch.ones(6, dtype=torch.int64), torch.tensor(3), 2, step=step)
    with pytest.raises(ConfigError, match=f"margins=None of step={step} must be"):
        LookaheadBias(early_steps=1).updated(torch.zeros(6), torch.zeros(1, 6), counts)


def test_margins_are_asked_for_ahead_early_and_of_decisions_now_and_then_late():
    rule = LookaheadBias(early_steps=3, sample=7)
    assert [rule.margins_at(step) for step in range(3)] == [MarginRequest(7, ahead=True)] * 3
    assert [step for step in range(3, 30) if rule.margins_at(step) == MarginRequest(7)] == [3, 11, 19, 27]
    assert [step for step in range(30) if rule.margins_at(step) is not None] == [0, 1, 2, 3, 11, 19, 27]


def test_a_sample_is_spread_over_the_call_and_padding_is_left_out():
    layer, x = layer_of(sample=8), torch.randn(31, 8)
    mask = torch.arange(31) % 4 != 0  # of tokens 0, 4, 8, ... none counts
    layer(x, mask)
    ((tokens, kept_mask),) = layer.balancer.sample.take()
    assert torch.equal(tokens, x.where(mask[:, None], 0.0)[::4])
    assert not kept_mask.any()
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
    assert layer.balancer.steps == 0
    assert layer.balancer.sample.take() == []


def test_a_late_step_in_which_no_token_counts_keeps_what_was_measured():
    layer, x = layer_of(early_steps=1), torch.randn(30, 8)
    for _ in range(2):
        layer(x)
        moe.balance_step(layer)
    spread, bias = layer.balancer.bias_state.clone(), layer.router.score_bias.clone()
    assert (spread > 0).all()
    layer.balancer.reset_parameters()
    layer.balancer.bias_state.copy_(spread)
    for _ in range(2):  # an early one, and one that reads margins
        layer(x, torch.zeros(30, dtype=torch.bool))
        moe.balance_step(layer)
    assert layer.balancer.step_number == 2
    assert torch.equal(layer.balancer.bias_state, spread)
    assert torch.equal(layer.router.score_bias, bias)


def test_a_late_sample_of_padding_alone_keeps_what_was_measured():
    layer, x = layer_of(early_steps=1, sample=8), torch.randn(31, 8)
    layer(x)
    moe.balance_step(layer)
    layer.balancer.bias_state.fill_(0.5)
    bias = layer.router.score_bias.clone()
    layer(x, torch.arange(31) % 4 != 0)  # of tokens 0, 4, 8, ... none counts
    moe.balance_step(layer)
    assert (layer.balancer.bias_state == 0.5).all()
    assert not torch.equal(layer.router.score_bias, bias)


def test_what_it_counts_survives_a_checkpoint_and_a_cast():
    layer = layer_of()
    layer(torch.randn(30, 8))
    moe.balance_step(layer)
    other = layer_of(seed=1).to(torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    assert other.router.score_bias.dtype == torch.float32
    assert torch.equal(other.router.score_bias, layer.router.score_bias)
    assert other.balancer.step_number == other.balancer.steps == 1
    assert other.balancer.steps.dtype == torch.int64
    other.balancer.reset_parameters()
    assert other.balancer.step_number == other.balancer.steps == 0


def spread(spec, rows, options):
    """On a rank: its part of the tokens, a step of the bias."""
    mesh = ParallelMesh(Degrees.parse(spec))
    layer = layer_of(**options)
    parallel = parallelize(layer, mesh)
    return two_steps(layer, parallel.named_parameters(), slice(mesh.data_rank * rows, (mesh.data_rank + 1) * rows))


def two_steps(layer, parameters, rows):
    """Two steps of the bias, with the router's weight moved before each ends."""
    parameters = dict(parameters)
    for _ in range(2):
        x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1)) + 0.5
        layer(x[rows]).sum().backward()  # after which FSDP2 has the weights in parts again
        with torch.no_grad():
            parameters["router.weight"].mul_(1.25)
        moe.balance_step(layer)
    return layer.router.score_bias


@pytest.mark.parametrize("early_steps", [1, 2])
@pytest.mark.parametrize("spec", ["dp_shard=2", "dp_replicate=2", "dp_shard=2,tp=2"])
def test_ranks_find_the_bias_of_one_process(spec, early_steps):
    options = {"early_steps": early_steps}
    alone = layer_of(**options)
    expected = two_steps(alone, alone.named_parameters(), slice(None))
    assert expected.abs().max() > 0.01
    for found in run_local(spread, Degrees.parse(spec).world_size, (spec, 24, options), timeout=60):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_named():
    for options in ({"rate": -1.0}, {"limit": 0.0}, {"early_steps": 0}, {"sample": 0}):
        (name,) = options
        with pytest.raises(ConfigError, match=f"{name}="):
            LookaheadBias(**options)
    with pytest.raises(ConfigError, match=r"NoisyTopKRouter beside LookaheadBias.*other noise"):
        moe.MoE(8, 4, 4, 1, router="noisy_top_k", balance=[LookaheadBias()])
    with pytest.raises(ConfigError, match="num_groups=2 beside LookaheadBias"):
        moe.MoE(8, 4, 4, 1, router={"name": "sigmoid", "num_groups": 2, "top_groups": 1}, balance=[LookaheadBias()])


@pytest.mark.parametrize(("router", "spread"), [("softmax", 0.8), ("sigmoid", 0.8), ("threshold", 0.5)])
def test_late_steps_keep_what_early_ones_found_where_experts_differ(router, spread):
    """Under a frozen router: one expert whose scores are spread widely must not set the steps of the others."""
    torch.manual_seed(0)
    layer = moe.MoE(16, 4, 16, 2, router=router, balance=[LookaheadBias(early_steps=40)])
    with torch.no_grad():
        layer.router.weight.normal_(0, spread)
        mean, found = torch.randn(16), []
        for _ in range(120):
            layer(torch.randn(1024, 16) + mean)
            found.append(moe.balance_step(layer)[""].max_vio.item())
    early, late = sum(found[30:40]) / 10, sum(found[-10:]) / 10
    assert late < 1.5 * early  # the noise of a batch goes into the bias


def test_late_an_expert_that_nobody_chooses_is_back_soon():
    steps = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = moe.MoE(16, 4, 16, 2, router="sigmoid", balance=[LookaheadBias(early_steps=20)])
        with torch.no_grad():
            layer.router.weight.normal_(0, 0.8)
            mean = torch.randn(16)
            for step in range(80):
                if step == 25:
                    layer.router.score_bias[0] -= 0.5
                layer(torch.randn(1024, 16) + mean)
                load = moe.balance_step(layer)[""].load[0]
                if step >= 25 and load > 0.5 / 16:
                    steps.append(step - 25)
                    break
    assert len(steps) == 3
    assert sum(steps) < 30


def resumed():
    """On a rank: a step number after the state of a whole model was loaded."""
    mesh = ParallelMesh(Degrees.parse("dp_shard=2"))
    layer = layer_of(early_steps=2)
    parallel = parallelize(layer, mesh)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    two_steps(layer, parallel.named_parameters(), slice(None))
    whole = gather_state(parallel, optimizer)
    layer.balancer.reset_parameters()
    load_state(parallel, optimizer, _told(whole))
    return layer.balancer.step_number, layer.balancer.request.ahead


def _told(whole):
    found = [whole]
    torch.distributed.broadcast_object_list(found)
    return found[0]


def test_a_run_that_resumes_over_ranks_knows_how_many_steps_there_were():
    assert run_local(resumed, 2, timeout=60) == [(2, False)] * 2


def test_edges_hold_the_quantile():
    """What the rule relies on: the move lies in the bin where the share is reached."""
    scores = torch.rand(200, 6, generator=torch.Generator().manual_seed(0))
    ids = scores.argsort(-1, descending=True)[:, :2].int()
    counts = count_margins(scores, ids, torch.zeros(6))
    found = quantile(counts, 1 / 3)
    place = (counts.cumsum(1) >= counts.sum(1, keepdim=True) / 3).int().argmax(1)
    edges = bin_edges()
    assert ((edges[place] <= found) & (found <= edges[place + 1])).all()
