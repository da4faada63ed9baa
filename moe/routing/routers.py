"""The routers by name."""

from collections.abc import Callable
from functools import partial

from moe.routing.balanced import BalancedAssignmentRouter
from moe.routing.expert_choice import ExpertChoiceRouter
from moe.routing.hashed import HashRouter
from moe.routing.noisy import NoisyTopKRouter
from moe.routing.relu import ReluRouter
from moe.routing.router import Router
from moe.routing.scores import SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter, SwitchRouter
from moe.routing.sinkhorn import SinkhornRouter
from moe.routing.threshold import ThresholdRouter

ROUTERS: dict[str, Callable[..., Router]] = {
    "softmax": SoftmaxRouter,
    "top_k_softmax": partial(SoftmaxRouter, normalize=True),
    "sigmoid": SigmoidRouter,
    "sqrt_softplus": SqrtSoftplusRouter,
    "switch": SwitchRouter,
    "noisy_top_k": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "base": BalancedAssignmentRouter,
    "hash": HashRouter,
    "relu": ReluRouter,
    "threshold": ThresholdRouter,
}
"""Routers by the name that ``moe.MoE(router=...)`` takes; ``top_k_softmax`` is the softmax after the top-k."""
