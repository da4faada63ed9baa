"""How what a user asks for becomes terms, sorted by what is done with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from moe.balance.adaptive import AdaptiveL1
from moe.balance.bias import MomentumBias, RmsBias, ScoreBias
from moe.balance.device_losses import CommunicationBalance, DeviceBalance
from moe.balance.importance import ImportanceLoss, LoadLoss
from moe.balance.lookahead import LookaheadBias
from moe.balance.protocols import AdaptiveLoss, BalanceLoss, BiasRule, WeightLoss
from moe.balance.quantile import QuantileBias
from moe.balance.router_losses import RouterOrthogonality, RouterSimilarity, RouterZLoss
from moe.balance.share_losses import SquaredDeviation, SwitchLoss
from moe.config import make
from moe.errors import ConfigError

Term = BalanceLoss | WeightLoss | AdaptiveLoss | BiasRule
"""Anything that balances a layer."""

BalanceSpec = Sequence[Term] | Mapping[str, Mapping[str, Any] | None]
"""Terms, or their names with their options: ``{"squared_deviation": {"coefficient": 0.01}, "score_bias": {}}``."""

LOSSES: Mapping[str, Callable[..., BalanceLoss | WeightLoss | AdaptiveLoss]] = {
    "squared_deviation": SquaredDeviation,
    "switch": SwitchLoss,
    "device_balance": DeviceBalance,
    "communication_balance": CommunicationBalance,
    "importance": ImportanceLoss,
    "load": LoadLoss,
    "router_z": RouterZLoss,
    "router_orthogonality": RouterOrthogonality,
    "router_similarity": RouterSimilarity,
    "adaptive_l1": AdaptiveL1,
}
"""Losses by the name that a ``balance`` mapping takes."""

BIAS_RULES: Mapping[str, Callable[..., BiasRule]] = {
    "score_bias": ScoreBias,
    "rms_bias": RmsBias,
    "momentum_bias": MomentumBias,
    "quantile_bias": QuantileBias,
    "lookahead_bias": LookaheadBias,
}
"""Controllers without a loss by the name that a ``balance`` mapping takes."""


@final
@dataclass(frozen=True)
class Terms:
    """What balances a layer."""

    losses: tuple[BalanceLoss, ...]
    """Losses of routing decisions."""
    weight_losses: tuple[WeightLoss, ...]
    """Losses of the router's weight."""
    adaptive: Mapping[str, AdaptiveLoss]
    """Losses with a state, which is kept under these names."""
    bias_rule: BiasRule | None
    """What moves the selection bias; None leaves the layer without one."""

    @property
    def all(self) -> tuple[Term, ...]:
        """All of them, losses first."""
        rules = () if self.bias_rule is None else (self.bias_rule,)
        return (*self.losses, *self.weight_losses, *self.adaptive.values(), *rules)


def make_balance(spec: BalanceSpec) -> Terms:
    """Sort what a user asked for by kind.

    Raises:
        ConfigError: an unknown name, an option a term does not have, two bias rules, two adaptive losses of one kind,
            or an object that is no term.
    """
    if isinstance(spec, Mapping):
        spec = [_make_term(name, options) for name, options in spec.items()]
    elif isinstance(spec, str) or not isinstance(spec, Sequence):
        raise ConfigError(
            f"balance={spec!r} must be a mapping of names to options, or a sequence of terms; () for none"
        )
    losses: list[BalanceLoss] = []
    weight_losses: list[WeightLoss] = []
    adaptive: dict[str, AdaptiveLoss] = {}
    rules: list[BiasRule] = []
    for term in spec:
        if isinstance(term, type):
            raise ConfigError(f"balance={term.__name__} is a class; give an instance of it")
        if isinstance(term, BiasRule):
            rules.append(term)
        elif isinstance(term, AdaptiveLoss):
            if (name := _state_name(term)) in adaptive:
                raise ConfigError(f"balance has two of {type(term).__name__}; their states would have one name")
            adaptive[name] = term
        elif isinstance(term, WeightLoss):
            weight_losses.append(term)
        elif isinstance(term, BalanceLoss):
            losses.append(term)
        else:
            raise ConfigError(
                f"balance={term!r} is neither a bias rule nor a loss (a coefficient and a call on a Routing)"
            )
    if len(rules) > 1:
        named = ", ".join(type(rule).__name__ for rule in rules)
        raise ConfigError(
            f"balance has {len(rules)} bias rules ({named}); a layer has one bias, so name one rule for it"
        )
    return Terms(tuple(losses), tuple(weight_losses), adaptive, rules[0] if rules else None)


def _make_term(name: str, options: Mapping[str, Any] | None) -> Term:
    if not isinstance(options, Mapping | None):
        raise ConfigError(f"balance={name!r} has options {options!r}; they must be a mapping, or null for the defaults")
    registry: Mapping[str, Callable[..., Term]] = {**LOSSES, **BIAS_RULES}
    return make("balance", {**(options or {}), "name": name}, registry)


def _state_name(term: AdaptiveLoss) -> str:
    """What a config calls it; the name of its class where that is a user's own."""
    kind = type(term)
    return next((name for name, known in LOSSES.items() if known is kind), kind.__name__)
