"""Mixture-of-Experts layers for PyTorch: routing, balance and deterministic dispatch."""

from typing import Any

from moe.balance import RouterZLoss, ScoreBias, SquaredDeviation, SwitchLoss, checkpoint_contexts
from moe.layer import (
    MoE,
    balance_loss,
    balance_step,
    count_ahead,
    moe_layers,
    record_routing,
    replay_routing,
    take_evaluation_load,
)
from moe.monitor import LoadStats
from moe.types import Routing

__version__ = "0.1.0"

__all__ = [
    "LoadStats",
    "MoE",
    "RouterZLoss",
    "Routing",
    "ScoreBias",
    "SquaredDeviation",
    "SwitchLoss",
    "balance_loss",
    "balance_step",
    "checkpoint_contexts",
    "count_ahead",
    "moe_layers",
    "parallelize",
    "record_routing",
    "replay_routing",
    "take_evaluation_load",
]


def __getattr__(name: str) -> Any:
    """``moe.parallelize``, when it is asked for: torch.distributed's parts take a second to import."""
    if name == "parallelize":
        from moe.parallel import parallelize

        return parallelize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
