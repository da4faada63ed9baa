"""What balances a layer unless told otherwise, chosen from the sweep (see docs/explanation/defaults.md)."""

from collections.abc import Mapping
from typing import Any

from moe.balance import BalanceSpec
from moe.routing import Router

_BY_BIAS: BalanceSpec = {"lookahead_bias": {}}
_BY_LOSS: BalanceSpec = {"squared_deviation": {}}
_NOT_BY_SCORES: Mapping[str, BalanceSpec] = {
    "noisy_top_k": {"importance": {}, "load": {}},
    "relu": {"adaptive_l1": {}},
    "threshold": {"switch": {}},
    "expert_choice": {},
    "sinkhorn": {},
    "base": {},
    "hash": {},
}
"""Of routers that balance by themselves in training, cannot be balanced, or have a balance of their own."""


def default_balance(router: str | Mapping[str, Any] | Router) -> BalanceSpec:
    """The balance that suits a router.

    ``lookahead_bias`` where scores decide; with groups, to whose margins it has no access, ``squared_deviation``. What
    the papers have for ``noisy_top_k``, ``relu`` and ``threshold``; nothing for routers that balance by themselves in
    training, or not at all.

    Args:
        router: as `moe.MoE` takes it. An object gets ``lookahead_bias`` if it was made with ``score_bias`` and has
            neither groups nor noise, else ``squared_deviation``.
    """
    if isinstance(router, Router):
        suits = router.score_bias is not None and router.num_groups is None and not router.adds_noise
        return _BY_BIAS if suits else _BY_LOSS
    options = {"name": router} if isinstance(router, str) else router
    name = str(options.get("name"))
    if name in _NOT_BY_SCORES:
        return _NOT_BY_SCORES[name]
    return _BY_LOSS if options.get("num_groups") is not None else _BY_BIAS
