"""What makes the load of experts even: losses, a selection bias, and the book-keeping that counts each call once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe.balance.bias import ScoreBias
from moe.balance.calls import Call, CallLog, attach, in_backward
from moe.balance.losses import (
    LOSSES,
    BalanceLoss,
    RouterZLoss,
    SquaredDeviation,
    SwitchLoss,
    count_tokens,
    load_share,
    mean_probability,
    squared_deviation,
)
from moe.config import make
from moe.errors import ConfigError

__all__ = [
    "BalanceLoss",
    "BalanceSpec",
    "Call",
    "CallLog",
    "RouterZLoss",
    "ScoreBias",
    "SquaredDeviation",
    "SwitchLoss",
    "attach",
    "count_tokens",
    "in_backward",
    "load_share",
    "make_balance",
    "mean_probability",
    "squared_deviation",
]

_TERMS: Mapping[str, Callable[..., BalanceLoss | ScoreBias]] = {**LOSSES, "score_bias": ScoreBias}

BalanceSpec = Sequence[BalanceLoss | ScoreBias] | Mapping[str, Mapping[str, Any] | None]
"""Terms, or their names with their options: ``{"squared_deviation": {"coefficient": 0.01}, "score_bias": {}}``."""


def make_balance(spec: BalanceSpec) -> tuple[tuple[BalanceLoss, ...], ScoreBias | None]:
    """Split what a user asked for into losses and, at most one, bias.

    Raises:
        ConfigError: an unknown name, an option a term does not have, two biases.
    """
    if isinstance(spec, Mapping):
        spec = [_make_term(name, options) for name, options in spec.items()]
    elif isinstance(spec, str) or not isinstance(spec, Sequence):
        raise ConfigError(
            f"balance={spec!r} must be a mapping of names to options, or a sequence of terms; () for none"
        )
    biases = [term for term in spec if isinstance(term, ScoreBias)]
    losses = tuple(term for term in spec if not isinstance(term, ScoreBias))
    if len(biases) > 1:
        raise ConfigError(f"balance has {len(biases)} score biases; a layer has one bias, so name one rule for it")
    for term in losses:
        if isinstance(term, type) or not isinstance(term, BalanceLoss):
            raise ConfigError(
                f"balance={term!r} is neither a ScoreBias nor a loss (a coefficient and a call on a Routing)"
            )
    return losses, biases[0] if biases else None


def _make_term(name: str, options: Mapping[str, Any] | None) -> BalanceLoss | ScoreBias:
    if not isinstance(options, Mapping | None):
        raise ConfigError(f"balance={name!r} has options {options!r}; they must be a mapping, or null for the defaults")
    return make("balance", {**(options or {}), "name": name}, _TERMS)
