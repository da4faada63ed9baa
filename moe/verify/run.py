"""Training steps that are written down: by a rank of many, and by the one process that is right."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from moe.layer import balance_step, moe_layers
from moe.parallel import Degrees, ParallelMesh, parallelize
from moe.parallel.gather import Whole, gather
from moe.parallel.norm import local_part
from moe.verify.factory import Factory, Trial, build
from moe.verify.faults import planted
from moe.verify.options import VerifyOptions

LEARNING_RATE, MOMENTUM = 0.1, 0.9
"""Of plain SGD: an optimizer that divides by the gradient's size would hide a wrong scale, and magnify rounding."""
Collect = Callable[[Callable[[Tensor], Tensor | None]], Iterable[Whole]]
"""Puts whole parameters together, or something laid out like them; nothing on ranks other than 0."""


@final
@dataclass(frozen=True)
class Step:
    """What a step was."""

    losses: dict[tuple[int, int], float]
    """By micro-batch and data rank."""
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
        planted: whether a planted fault changed something here.
    """

    steps: tuple[Step, ...]
    parameters: dict[str, Whole]
    max_norm: float
    planted: bool = False


def run_reference(trial: Trial, degrees: Degrees, options: VerifyOptions) -> Trace:
    """All micro-batches of all data ranks, one after another in this process."""
    named = dict(trial.model.named_parameters())

    def collect(of: Callable[[Tensor], Tensor | None]) -> list[Whole]:
        found = [(name, of(parameter)) for name, parameter in named.items()]
        return [Whole(name, tensor.detach().clone(), 0.0) for name, tensor in found if tensor is not None]

    clip = partial(nn.utils.clip_grad_norm_, list(named.values()))
    return _run(trial, degrees, options, range(degrees.dp), clip, collect)


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
        mesh = ParallelMesh(degrees)
        parallel = parallelize(
            trial.model, mesh, chunks=options.chunks, max_received_tokens=options.max_received_tokens
        )
        if options.compile is not None:
            trial.model.compile(backend=options.compile)
        data, clip, collect = [mesh.data_rank], parallel.clip_grad_norm_, partial(gather, parallel)
        trace = _run(trial, degrees, options, data, clip, collect, max_norm)
    return Trace(trace.steps, trace.parameters, max_norm, bool(fired))


def _run(
    trial: Trial,
    degrees: Degrees,
    options: VerifyOptions,
    data_ranks: Sequence[int],
    clip: Callable[[float], Tensor],
    collect: Collect,
    max_norm: float | None = None,
) -> Trace:
    max_norm = options.max_norm if max_norm is None else max_norm
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    steps = []
    for step in range(options.steps):
        losses = _backward(trial, degrees, options, step, data_ranks)
        gradients = {whole.name: whole for whole in collect(lambda parameter: parameter.grad)}
        if max_norm is None:
            max_norm = clip(float("inf")).item() / 2
        before = _local_norm(trial.model)
        norm = clip(max_norm).item()
        factor = _local_norm(trial.model) / before
        optimizer.step()
        loads = balance_step(trial.model)
        optimizer.zero_grad()
        counts = {name: load.tokens_per_expert for name, load in loads.items()}
        biases = {name: layer.router.score_bias for name, layer in moe_layers(trial.model)}
        kept = {name: bias.clone() for name, bias in biases.items() if bias is not None}
        steps.append(Step(losses, gradients, norm, factor, counts, kept))
    assert max_norm is not None
    return Trace(tuple(steps), {whole.name: whole for whole in collect(lambda parameter: parameter)}, max_norm)


def _backward(
    trial: Trial, degrees: Degrees, options: VerifyOptions, step: int, data_ranks: Sequence[int]
) -> dict[tuple[int, int], float]:
    """Add up the gradients of a step, and return the losses of its micro-batches."""
    losses = {}
    rows = options.micro_batch_size(degrees)
    for micro in range(options.accumulate):
        for rank in data_ranks:
            number = (step * options.accumulate + micro) * degrees.dp + rank
            is_last = micro == options.accumulate - 1 and rank == degrees.dp - 1
            # The last batch of a step is a partial one: ranks differ in how many tokens they have.
            batch = trial.batch(options.seed * 1_000_003 + number, max(1, rows - is_last))
            loss = trial.loss_of(batch)
            (loss / (options.accumulate * len(data_ranks))).backward()
            losses[micro, rank] = loss.item()
    return losses


def _local_norm(model: nn.Module) -> float:
    """Of the gradients that this process holds."""
    parts = [local_part(p.grad).double() for p in model.parameters() if p.grad is not None]
    squares = [part.square().sum() for part in parts]
    return float(torch.stack(squares).sum().sqrt()) if squares else float("nan")
