"""The layer, and what is done to all layers of a model at once."""

from moe.layer.defaults import default_balance
from moe.layer.moe import MoE, PoolCounts, moe_layers
from moe.layer.record import Decisions, count_ahead, record_routing, replay_routing
from moe.layer.step import balance_loss, balance_step, take_evaluation_load

__all__ = [
    "Decisions",
    "MoE",
    "PoolCounts",
    "balance_loss",
    "balance_step",
    "count_ahead",
    "default_balance",
    "moe_layers",
    "record_routing",
    "replay_routing",
    "take_evaluation_load",
]
