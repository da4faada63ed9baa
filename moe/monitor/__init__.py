"""How evenly the parts of a model are used, what experts do with which tokens, and what an uneven load costs."""

from moe.monitor.decisions import Decisions, Drift, decision_drift, router_margin
from moe.monitor.load import LoadCounter, LoadStats, count_load, max_violation, max_violation_floor
from moe.monitor.price import ImbalancePrice, price_of_imbalance
from moe.monitor.specialization import (
    Specialization,
    co_activation,
    co_activation_probability,
    specialization,
)

__all__ = [
    "Decisions",
    "Drift",
    "ImbalancePrice",
    "LoadCounter",
    "LoadStats",
    "Specialization",
    "co_activation",
    "co_activation_probability",
    "count_load",
    "decision_drift",
    "max_violation",
    "max_violation_floor",
    "price_of_imbalance",
    "router_margin",
    "specialization",
]
