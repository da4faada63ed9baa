"""Mixture-of-Experts layers for PyTorch: routing, balance and deterministic dispatch."""

from moe.balance import RouterZLoss, ScoreBias, SquaredDeviation, SwitchLoss
from moe.layer import MoE, balance_loss, balance_step, moe_layers, take_evaluation_load
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
    "moe_layers",
    "take_evaluation_load",
]
