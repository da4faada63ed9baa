"""Faults in what ends a step: the scale of gradients, their norm, counts and biases.

Each function takes what it calls once it has changed something, and returns what it replaces.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe.balance import ScoreBias, StepCounts
from moe.parallel import norm
from moe.parallel.dispatcher import ExpertParallel
from moe.parallel.loads import PoolCounts
from moe.parallel.parallelize import Parallel
from moe.verify.planting import PARALLELIZE, Fire, Patch


def wrong_expert_average(fire: Fire) -> list[Patch]:
    """The factor that corrects the experts' mean is left out."""

    def make(*args: Any, **options: Any) -> ExpertParallel:
        right = ExpertParallel(*args, **options)
        if right.gradient_scale != 1:
            fire()
        return replace(right, gradient_scale=1.0)

    return [(PARALLELIZE, "ExpertParallel", make)]


def norm_without_other_experts(fire: Fire) -> list[Patch]:
    """Parts that differ over ``ep`` and ``etp`` count as copies of one."""
    original = Parallel._copies

    def copies(self: Parallel, name: str, parameter: Tensor) -> int:
        found = original(self, name, parameter)
        for axis in {"ep", "etp"} & set(self.shards[name].axes):
            fire()
            found *= getattr(self.mesh.degrees, axis)
        return found

    return [(Parallel, "_copies", copies)]


def local_norm(fire: Fire) -> list[Patch]:
    """No rank heeds the others."""
    original = norm.total_norm

    def total_norm(gradients: Iterable[tuple[Tensor, int]], norm_type: float = 2.0) -> Tensor:
        held = list(gradients)
        sizes = [torch.linalg.vector_norm(norm.local_part(gradient), norm_type) for gradient, _ in held]
        own = torch.linalg.vector_norm(torch.stack(sizes), norm_type) if sizes else torch.zeros(())
        if not torch.isclose(own, original(held, norm_type)):
            fire()
        return own

    return [(PARALLELIZE, "total_norm", total_norm)]


def clip_twice(fire: Fire) -> list[Patch]:
    """Clipping, and again by the norm before."""
    original = norm.clip

    def clip(parameters: Iterable[Any], total: Tensor, max_norm: float) -> Tensor:
        both = list(parameters)
        if original(both, total, max_norm) < 1:
            fire()
        return original(both, total, max_norm)

    return [(PARALLELIZE, "clip", clip)]


def bias_twice(fire: Fire) -> list[Patch]:
    """The rule's step, and again."""
    original = ScoreBias.updated

    def updated(self: ScoreBias, bias: Tensor, state: Tensor, counts: StepCounts) -> tuple[Tensor, Tensor]:
        once, state = original(self, bias, state, counts)
        if not torch.equal(once, bias):
            fire()
        return original(self, once, state, counts)

    return [(ScoreBias, "updated", updated)]


def local_counts(fire: Fire) -> list[Patch]:
    """Each rank keeps its own."""

    def pool(self: PoolCounts, counts: Sequence[Tensor]) -> list[Tensor]:
        del self
        fire()
        return list(counts)

    return [(PoolCounts, "__call__", pool)]


def double_counts(fire: Fire) -> list[Patch]:
    """Twice the sum over data ranks."""
    original = PoolCounts.__call__

    def pool(self: PoolCounts, counts: Sequence[Tensor]) -> list[Tensor]:
        fire()
        return [2 * each for each in original(self, counts)]

    return [(PoolCounts, "__call__", pool)]
