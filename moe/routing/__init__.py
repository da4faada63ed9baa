"""Tokens over experts: scores, selection, weights, capacity."""

from moe.routing.assignment import balanced_assignment
from moe.routing.balanced import BalancedAssignmentRouter
from moe.routing.capacity import limit_capacity
from moe.routing.expert_choice import ExpertChoiceRouter
from moe.routing.hashed import HashRouter, balanced_table
from moe.routing.noisy import NoisyTopKRouter, selection_probability
from moe.routing.null_experts import null_weight, without_null
from moe.routing.relu import ReluRouter
from moe.routing.router import Router, Tokens
from moe.routing.routers import ROUTERS
from moe.routing.scores import SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter, SwitchRouter
from moe.routing.sinkhorn import SinkhornRouter, sinkhorn_plan
from moe.routing.threshold import ThresholdRouter

__all__ = [
    "ROUTERS",
    "BalancedAssignmentRouter",
    "ExpertChoiceRouter",
    "HashRouter",
    "NoisyTopKRouter",
    "ReluRouter",
    "Router",
    "SigmoidRouter",
    "SinkhornRouter",
    "SoftmaxRouter",
    "SqrtSoftplusRouter",
    "SwitchRouter",
    "ThresholdRouter",
    "Tokens",
    "balanced_assignment",
    "balanced_table",
    "limit_capacity",
    "null_weight",
    "selection_probability",
    "sinkhorn_plan",
    "without_null",
]
