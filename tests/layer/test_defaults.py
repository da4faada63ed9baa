"""What balances a layer unless told otherwise."""

import pytest
import torch

import moe
from moe.balance import AdaptiveL1, ImportanceLoss, LoadLoss, LookaheadBias, SquaredDeviation, SwitchLoss
from moe.layer import default_balance
from moe.routing import ROUTERS, NoisyTopKRouter, SigmoidRouter

AHEAD = {LookaheadBias}
EXPECTED = {
    **dict.fromkeys(("softmax", "top_k_softmax", "sigmoid", "sqrt_softplus", "switch"), AHEAD),
    **{name: set() for name in ("expert_choice", "sinkhorn", "base", "hash")},
    "noisy_top_k": {ImportanceLoss, LoadLoss},
    "relu": {AdaptiveL1},
    "threshold": {SwitchLoss},
}


def kinds(layer):
    return {type(term) for term in layer.balancer.terms.all}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_has_a_default_that_it_can_take(name):
    options = {"name": name, "vocab_size": 9} if name == "hash" else name
    torch.manual_seed(0)
    layer = moe.MoE(8, 4, 6, 1 if name == "switch" else 2, router=options)
    assert kinds(layer) == EXPECTED[name]
    y = layer(torch.randn(20, 8), token_ids=torch.randint(9, (20,)))
    (y.square().sum() + moe.balance_loss(layer)).backward()
    assert moe.balance_step(layer)[""].tokens == 20


def test_the_default_is_by_what_the_router_can_take():
    grouped = {"name": "sigmoid", "num_groups": 2, "top_groups": 1}
    assert kinds(moe.MoE(8, 4, 6, 2, router=grouped)) == {SquaredDeviation}
    assert kinds(moe.MoE(8, 4, 6, 2, router=SigmoidRouter(8, 6, 2))) == {SquaredDeviation}
    assert kinds(moe.MoE(8, 4, 6, 2, router=SigmoidRouter(8, 6, 2, score_bias=True))) == AHEAD
    assert kinds(moe.MoE(8, 4, 6, 2, router=NoisyTopKRouter(8, 6, 2, score_bias=True))) == {SquaredDeviation}
    assert kinds(moe.MoE(8, 4, 6, 2, balance=())) == set()
    assert default_balance("softmax") == default_balance({"name": "softmax", "scale": 2.0}) == {"lookahead_bias": {}}


def test_the_default_balances_what_no_balance_leaves_collapsed():
    found = {}
    for balance in ((), None):
        torch.manual_seed(0)
        layer = moe.MoE(16, 8, 16, 2, balance=balance)
        with torch.no_grad():
            layer.router.weight.mul_(3)
        x = torch.randn(512, 16) + 2 * torch.randn(16)
        for _ in range(4):
            layer(x)
            load = moe.balance_step(layer)[""]
        found[balance is None] = load.max_vio.item()
    assert found[False] > 3
    assert found[True] < 0.3
