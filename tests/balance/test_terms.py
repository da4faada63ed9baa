"""What a user asks for, by name and by object, sorted by kind."""

from dataclasses import dataclass

import pytest
import torch

import moe
from moe.balance import (
    BIAS_RULES,
    LOSSES,
    AdaptiveL1,
    AdaptiveLoss,
    BalanceLoss,
    BiasRule,
    CommunicationBalance,
    DeviceBalance,
    MomentumBias,
    RmsBias,
    RouterOrthogonality,
    RouterSimilarity,
    RouterZLoss,
    ScoreBias,
    SquaredDeviation,
    SwitchLoss,
    Terms,
    WeightLoss,
    make_balance,
)
from moe.errors import ConfigError

SIZES = {
    "device_balance": {"num_devices": 2},
    "communication_balance": {"num_devices": 2, "top_devices": 1},
}


def test_terms_by_name_and_by_object():
    terms = make_balance({"squared_deviation": {"coefficient": 0.1}, "score_bias": {"rate": 0.5}, "router_z": None})
    assert terms == Terms((SquaredDeviation(0.1), RouterZLoss()), (), {}, ScoreBias(0.5))
    assert make_balance([SwitchLoss()]) == Terms((SwitchLoss(),), (), {}, None)
    assert make_balance(()) == make_balance({}) == Terms((), (), {}, None)


def test_terms_of_every_kind_are_told_apart():
    spec = {name: SIZES.get(name) for name in LOSSES} | {"momentum_bias": {"rate": 0.5}}
    terms = make_balance(spec)
    assert terms.weight_losses == (RouterOrthogonality(), RouterSimilarity())
    assert terms.adaptive == {"adaptive_l1": AdaptiveL1()}
    assert terms.bias_rule == MomentumBias(0.5)
    assert len(terms.losses) == len(LOSSES) - 3
    assert DeviceBalance(num_devices=2) in terms.losses
    assert CommunicationBalance(num_devices=2, top_devices=1) in terms.losses
    assert len(terms.all) == len(LOSSES) + 1
    assert terms.all[-1] == MomentumBias(0.5)


@pytest.mark.parametrize("name", [*LOSSES, *BIAS_RULES])
def test_every_name_is_of_one_kind(name):
    (term,) = make_balance({name: SIZES.get(name)}).all
    assert sum(isinstance(term, kind) for kind in (BalanceLoss, WeightLoss, AdaptiveLoss, BiasRule)) == 1


def test_scopes_by_name():
    (loss,) = make_balance({"switch": {"scope": "sequence", "coefficient": 1e-4}}).losses
    assert loss == SwitchLoss(1e-4, scope="sequence")
    assert loss.scope.value == "sequence"


@dataclass(frozen=True)
class OwnLoss:
    coefficient: float = 1.0

    def __call__(self, routing):
        return routing.scores.sum()


@dataclass(frozen=True)
class OwnAdaptive:
    def initial_state(self):
        return torch.zeros(2)

    def __call__(self, routing, state):
        return routing.scores.sum()

    def updated(self, state, counts):
        return state


@dataclass(frozen=True)
class OwnRule:
    state_rows: int = 2

    def margins_at(self, step):
        return None

    def updated(self, bias, state, counts):
        return bias, state


def test_a_users_own_terms_are_known_by_what_they_can_do():
    terms = make_balance([OwnLoss(), OwnAdaptive(), OwnRule()])
    assert terms == Terms((OwnLoss(),), (), {"OwnAdaptive": OwnAdaptive()}, OwnRule())


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"swich": {}}, "balance='swich' is unknown; .*squared_deviation.*quantile_bias.*did you mean 'switch'"),
        ({"switch": {"coeficient": 1}}, "balance='switch' does not take these options.*coeficient"),
        ({"switch": 0.1}, "balance='switch' has options 0.1; they must be a mapping"),
        ({"switch": {"coefficient": -0.5}}, "coefficient=-0.5 must be positive"),
        ([ScoreBias(), RmsBias()], r"2 bias rules \(ScoreBias, RmsBias\)"),
        ({"score_bias": {}, "quantile_bias": {}}, "2 bias rules"),
        ([AdaptiveL1(), AdaptiveL1(0.1)], "two of AdaptiveL1"),
        (["switch"], "balance='switch' is neither"),
        ([SwitchLoss], "balance=SwitchLoss is a class"),
        ("switch", "balance='switch' must be a mapping"),
        (3, "balance=3 must be a mapping"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_terms_are_named(balance, message):
    with pytest.raises(ConfigError, match=message):
        make_balance(balance)
    with pytest.raises(ConfigError, match=message):
        moe.MoE(8, 8, 4, balance=balance)
