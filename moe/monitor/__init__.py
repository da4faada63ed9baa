"""How evenly the parts of a model are used."""

from moe.monitor.load import LoadCounter, LoadStats, count_load, max_violation, max_violation_floor

__all__ = ["LoadCounter", "LoadStats", "count_load", "max_violation", "max_violation_floor"]
