"""Training steps that are written down: by a rank of many, and by the one process that is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from moe.parallel import Degrees, ParallelMesh
from moe.parallel.gather import Whole
from moe.verify.factory import Factory, Trial, build
from moe.verify.faults import planted
from moe.verify.learner import Learner, alone, spread
from moe.verify.options import VerifyOptions

LEARNING_RATE, MOMENTUM = 0.1, 0.9
"""Of plain SGD: an optimizer that divides by the gradient's size would hide a wrong scale, and magnify rounding."""


@final
@dataclass(frozen=True)
class Step:
    """What a step was."""

    losses: dict[tuple[int, int], float]
    """By backward pass and data rank."""
    gradients: dict[str, Whole]
    """Before clipping, by the parameter's name."""
    norm: float
    """As clipping reports it."""
    clip_factor: float
    """As measured: by how much the gradients of this process became shorter."""
    tokens_per_expert: dict[str, Tensor]
    """By layer."""
    score_bias: dict[str, Tensor]
    """By layer, after the step."""


@final
@dataclass(frozen=True)
class Trace:
    """What a run was.

    Attributes:
        steps: in their order.
        parameters: after them.
        max_norm: what gradients were clipped to.
        layers: the MoE layers that this process has a part of.
        planted: whether a planted fault changed something here.
    """

    steps: tuple[Step, ...]
    parameters: dict[str, Whole]
    max_norm: float
    layers: frozenset[str]
    planted: bool


def run_reference(trial: Trial, degrees: Degrees, options: VerifyOptions) -> Trace:
    """All micro-batches of all data ranks, one after another in this process."""
    return _run(alone(trial), trial, degrees, options, range(degrees.dp), options.max_norm, [])


def run_rank(factory: Factory, degrees: Degrees, options: VerifyOptions, max_norm: float) -> Trace:
    """The micro-batches of this rank; collective.

    Args:
        factory: see :data:`moe.verify.factory.Factory`.
        degrees: of the ranks that call it.
        options: the same as for the reference.
        max_norm: what the reference was clipped to.
    """
    with planted(options.fault) as fired:
        trial = build(factory, options.seed, options.precision.dtype)
        mesh = ParallelMesh(degrees, node_size=options.node_size)
        return _run(spread(trial, mesh, options), trial, degrees, options, [mesh.data_rank], max_norm, fired)


def _run(
    learner: Learner,
    trial: Trial,
    degrees: Degrees,
    options: VerifyOptions,
    data_ranks: Sequence[int],
    max_norm: float | None,
    fired: Sequence[str],
) -> Trace:
    optimizer = torch.optim.SGD(learner.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    steps = []
    for step in range(options.steps):
        losses = _backward(learner, trial, degrees, options, step, data_ranks)
        gradients = {whole.name: whole for whole in learner.collect(lambda parameter: parameter.grad)}
        if max_norm is None:
            max_norm = learner.clip(float("inf")).item() / 2
        before = learner.local_norm()
        norm = learner.clip(max_norm).item()
        factor = learner.local_norm() / before
        optimizer.step()
        counts = {name: load.tokens_per_expert for name, load in learner.balance_step().items()}
        optimizer.zero_grad()
        biases = {name: bias.clone() for name, bias in learner.score_biases().items() if bias is not None}
        steps.append(Step(losses, gradients, norm, factor, counts, biases))
    assert max_norm is not None
    parameters = {whole.name: whole for whole in learner.collect(lambda parameter: parameter)}
    return Trace(tuple(steps), parameters, max_norm, frozenset(learner.score_biases()), bool(fired))


def _backward(
    learner: Learner, trial: Trial, degrees: Degrees, options: VerifyOptions, step: int, data_ranks: Sequence[int]
) -> dict[tuple[int, int], float]:
    """Add up the gradients of a step, and return the losses of its backward passes."""
    losses = {}
    rows, parts = options.micro_batch_size(degrees), options.parts(degrees)
    for micro in range(options.accumulate):
        for rank in data_ranks:
            number = (step * options.accumulate + micro) * degrees.dp + rank
            # The last batch of a step is a partial one: ranks differ in how many tokens they have.
            is_last = micro == options.accumulate - 1 and rank == degrees.dp - 1
            seeds = [options.seed * 1_000_003 + number * parts + part for part in range(parts)]
            batches = [trial.batch(seed, max(1, rows - is_last)) for seed in seeds]
            losses[micro, rank] = learner.backward(batches, 1 / (options.accumulate * len(data_ranks)))
    return losses
