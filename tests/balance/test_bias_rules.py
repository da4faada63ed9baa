"""Bias rules that move by the load of a step, against float64 loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.balance import BIAS_RULES, LookaheadBias, MomentumBias, QuantileBias, RmsBias, ScoreBias
from moe.errors import ConfigError
from moe.kernels.margins import BINS
from tests.balance.decisions import step_counts

RULES = [ScoreBias(0.25), RmsBias(0.25), MomentumBias(0.25), QuantileBias()]
BY_LOAD = RULES[:3]
LOADS = st.lists(st.integers(0, 2**40), min_size=1, max_size=9)


def named(rule):
    return type(rule).__name__


def updated(rule, bias, counts, state=None):
    state = torch.zeros(rule.state_rows, len(bias)) if state is None else state
    return rule.updated(bias, state, counts)


def test_the_sign_rule_moves_by_the_rate_towards_balance():
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0])
    moved, _ = updated(ScoreBias(rate=0.25), bias, step_counts([9, 1, 5, 5]))
    assert moved.tolist() == [-0.25, 0.75, -0.5, 0.0]  # mean 5: too many, too few, just right, just right


def test_the_sign_rule_compares_in_integers():
    """Counts whose mean is no float32: 3 experts, 2^24 + 1 assignments each, but for one."""
    counts = [2**24 + 1] * 3
    assert updated(ScoreBias(1.0), torch.zeros(3), step_counts(counts))[0].tolist() == [0, 0, 0]
    counts[0] += 1
    assert updated(ScoreBias(1.0), torch.zeros(3), step_counts(counts))[0].tolist() == [-1, 1, 1]


@given(LOADS)
def test_the_rms_rule_against_loops(load):
    moved, _ = updated(RmsBias(0.25), torch.zeros(len(load)), step_counts(load))
    total = max(sum(load), 1)
    off = [c / total - 1 / len(load) for c in load]
    rms = math.sqrt(sum(x * x for x in off) / len(load))
    even = len(set(load)) == 1
    expected = [0.0 if even else -0.25 * x / rms for x in off]
    # Float32: a few roundings of 6e-8 each; steps are at most sqrt(E) times the rate. The loops subtract shares, which
    # leaves them 16 digits less those that 2^40 takes.
    assert moved.tolist() == pytest.approx(expected, abs=1e-5 if max(load) - min(load) > 2**20 else 1e-2)


def test_the_rms_rule_is_exactly_zero_at_balance_and_finite_beside_it():
    for count in (0, 1, 7, 2**24 + 1):
        moved, _ = updated(RmsBias(), torch.zeros(3), step_counts([count] * 3, tokens=1))
        assert moved.tolist() == [0, 0, 0]
    moved, _ = updated(RmsBias(1.0), torch.zeros(4), step_counts([10, 10, 11, 10]))
    assert moved.tolist() == pytest.approx([1 / math.sqrt(3)] * 2 + [-math.sqrt(3), 1 / math.sqrt(3)])


@given(st.lists(LOADS.filter(lambda load: len(load) == 3), min_size=1, max_size=4))
def test_the_momentum_rule_against_loops(steps):
    rule = MomentumBias(rate=0.5, momentum=0.75, sharpness=3.0)
    bias, state = torch.zeros(3), torch.zeros(1, 3)
    b, m = [0.0] * 3, [0.0] * 3
    for load in steps:
        bias, state = rule.updated(bias, state, step_counts(load))
        mean = sum(load) / 3
        if mean:
            d = [0.5 * math.tanh(3.0 * (mean - c) / mean) for c in load]
            d = [x - sum(d) / 3 for x in d]
            m = [0.75 * old + 0.25 * x for old, x in zip(m, d)]
            b = [old + x for old, x in zip(b, m)]
    assert bias.tolist() == pytest.approx(b, abs=1e-5)
    assert state[0].tolist() == pytest.approx(m, abs=1e-5)


def test_momentum_goes_on_where_the_load_is_even():
    state = torch.tensor([[0.5, -0.5]])
    bias, state = MomentumBias(momentum=0.5).updated(torch.zeros(2), state, step_counts([4, 4]))
    assert bias.tolist() == [0.25, -0.25]
    assert state.tolist() == [[0.25, -0.25]]


@pytest.mark.parametrize("rule", [RmsBias(0.25), MomentumBias(0.25)], ids=named)
@given(load=LOADS)
def test_a_centred_step_keeps_the_mean_of_the_bias(rule, load):
    moved, _ = updated(rule, torch.zeros(len(load)), step_counts(load))
    assert abs(moved.mean().item()) < 1e-6  # float32: up to nine steps of at most 0.75


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_nothing_moves_where_no_token_counts(rule):
    bias, state = torch.tensor([0.3, -0.1, 0.2]), torch.full((rule.state_rows, 3), 0.5)
    margins = torch.ones(3, BINS, dtype=torch.int32)
    moved, new_state = rule.updated(bias, state, step_counts([0, 0, 0], tokens=0, margins=margins))
    assert torch.equal(moved, bias)
    assert torch.equal(new_state, state)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_rules_are_pure_and_float32(rule):
    bias, state = torch.tensor([0.3, -0.1, 0.2]), torch.full((rule.state_rows, 3), 0.5)
    before = bias.clone(), state.clone()
    margins = torch.randint(0, 9, (3, BINS), dtype=torch.int32)
    counts = step_counts([9, 1, 2], margins=margins)
    torch.set_default_dtype(torch.float64)  # what a user's script may do
    try:
        moved, new_state = rule.updated(bias, state, counts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(bias, before[0])
    assert torch.equal(state, before[1])
    assert not torch.equal(moved, bias)
    assert moved.dtype == new_state.dtype == torch.float32
    assert new_state.shape == state.shape


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_no_rule_waits_for_the_device(rule):
    """A meta tensor has no numbers: whatever asked for one would raise."""
    counts = step_counts([9, 1, 2])
    counts = type(counts)(
        counts.tokens_per_expert.to("meta"), counts.tokens.to("meta"), 1,
        torch.ones(3, BINS, dtype=torch.int32, device="meta"),
    )  # fmt: skip
    state = torch.zeros(rule.state_rows, 3, device="meta")
    moved, state = rule.updated(torch.zeros(3, device="meta"), state, counts)
    assert moved.shape == (3,)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_one_expert_stays_where_it_is(rule):
    margins = torch.zeros(1, BINS, dtype=torch.int32)
    moved, _ = updated(rule, torch.zeros(1), step_counts([7], margins=margins))
    assert moved.tolist() == [0]


@pytest.mark.parametrize("rule", BY_LOAD, ids=named)
def test_it_balances_a_router_of_fixed_preferences(rule):
    """The same tokens again and again, the last experts likelier: the load comes close to even and stays."""
    scores = (torch.randn(512, 8) + torch.arange(8) / 4).softmax(-1)
    rule = type(rule)(rate=0.002)
    bias, state = torch.zeros(8), torch.zeros(rule.state_rows, 8)
    spread = []
    for _ in range(300):
        load = (scores + bias).topk(2, -1).indices.flatten().bincount(minlength=8)
        spread.append(load.max().item() / (512 * 2 / 8) - 1)
        bias, state = rule.updated(bias, state, step_counts(load, top_k=2))
    assert spread[0] > 0.8
    assert max(spread[-20:]) < 0.15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((lambda kind=kind, rate=rate: kind(rate=rate), f"rate={rate} must be positive")
          for kind in (ScoreBias, RmsBias, MomentumBias) for rate in (0, -1)),
        (lambda: MomentumBias(momentum=1), r"momentum=1 must be in \[0, 1\)"),
        (lambda: MomentumBias(momentum=-0.5), r"momentum=-0.5 must be in \[0, 1\)"),
        (lambda: MomentumBias(sharpness=0), "sharpness=0 must be positive"),
        (lambda: QuantileBias(damping=-0.5), "damping=-0.5 must be positive"),
        (lambda: QuantileBias(damping=1.5), "damping=1.5 must be at most 1"),
    ],
)  # fmt: skip
def test_bad_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_rule_of_the_table_is_tested_here():
    # tests/balance/test_lookahead.py has the one that looks at the router again.
    assert {*(type(rule) for rule in RULES), LookaheadBias} == set(BIAS_RULES.values())
