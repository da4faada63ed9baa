"""Tokens over experts: scores, selection, weights, capacity."""

from moe.routing.capacity import limit_capacity
from moe.routing.router import Router
from moe.routing.routers import ROUTERS, SigmoidRouter, SoftmaxRouter, SwitchRouter

__all__ = [
    "ROUTERS",
    "Router",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SwitchRouter",
    "limit_capacity",
]
