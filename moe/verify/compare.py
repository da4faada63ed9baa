"""The ranks' run held against the reference's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moe.parallel.gather import Whole
from moe.verify.report import GRADIENT, PARAMETER, Row
from moe.verify.run import Step, Trace

FLOOR = 1e-3
"""A tensor whose values are all smaller than this part of the model's largest is measured against the latter: what is
zero but for rounding has no relative error of its own."""


def compare(reference: Trace, ranks: Sequence[Trace], tolerance: float) -> Iterator[Row]:
    """Every comparison, in the order in which a run comes to them.

    Args:
        reference: of the one process.
        ranks: in their order; the first holds what was gathered.
        tolerance: for what is not counted; counts are exact where it is finite.
    """
    for number, expected in enumerate(reference.steps):
        yield from _step(number, expected, ranks, tolerance)
    yield from _tensors(PARAMETER, len(reference.steps), reference.parameters, ranks[0].parameters, tolerance)


def _step(place: int, expected: Step, ranks: Sequence[Trace], tolerance: float) -> Iterator[Row]:
    number, steps = place + 1, [trace.steps[place] for trace in ranks]
    losses = [abs(loss - expected.losses[key]) for step in steps for key, loss in step.losses.items()]
    scale = _scale(max(map(abs, expected.losses.values())))
    yield Row("loss", "", number, _worst(losses) / scale, 0.0, tolerance)
    yield from _tensors(GRADIENT, number, expected.gradients, steps[0].gradients, tolerance)
    yield _number("gradient norm", number, expected.norm, [step.norm for step in steps], tolerance)
    factors = [step.clip_factor for step in steps]
    yield _number("clip factor", number, expected.clip_factor, factors, tolerance)
    exact = tolerance if tolerance == float("inf") else 0.0
    for name, counts in expected.tokens_per_expert.items():
        found = [trace.steps[place].tokens_per_expert.get(name) for trace in ranks if name in trace.layers]
        yield _each_rank("expert counts", name, number, counts.double(), found, exact)
    for name, bias in expected.score_bias.items():
        kept = [trace.steps[place].score_bias.get(name) for trace in ranks if name in trace.layers]
        yield _each_rank("selection bias", name, number, bias, kept, tolerance)


def _tensors(
    quantity: str, step: int, expected: Mapping[str, Whole], found: Mapping[str, Whole], tolerance: float
) -> Iterator[Row]:
    """A row for each tensor; one that only one side has is compared with zeros."""
    sizes = [float(whole.tensor.abs().max()) for whole in expected.values() if whole.tensor.numel()]
    least = FLOOR * max(sizes, default=0.0)
    for name in [*expected, *sorted(found.keys() - expected.keys())]:
        ours, theirs = expected.get(name), found.get(name)
        shape = ours or theirs
        assert shape is not None
        nothing = torch.zeros_like(shape.tensor)
        right = nothing if ours is None else ours.tensor
        scale = _scale(max(_worst([right.abs().max()]), least))
        error = (right - (nothing if theirs is None else theirs.tensor)).abs().max()
        yield Row(
            quantity, name, step, float(error) / scale, (theirs.disagreement if theirs else 0.0) / scale, tolerance
        )


def _number(quantity: str, step: int, expected: float, found: Sequence[float], tolerance: float) -> Row:
    scale = _scale(abs(expected))
    error = _worst(abs(value - expected) for value in found)
    return Row(quantity, "", step, error / scale, (_worst(found) - min(found)) / scale, tolerance)


def _each_rank(
    quantity: str, name: str, step: int, expected: Tensor, found: Sequence[Tensor | None], tolerance: float
) -> Row:
    scale = _scale(float(expected.abs().max()))
    # What should be there and is not, counts as zeros.
    present = [torch.zeros_like(expected) if each is None else each.to(expected.dtype) for each in found or [None]]
    error = _worst((each - expected).abs().max() for each in present)
    apart = _worst((each - present[0]).abs().max() for each in present)
    return Row(quantity, name, step, error / scale, apart / scale, tolerance)


def _worst(values: Iterable[float | Tensor]) -> float:
    """The largest; NaN if any is."""
    return float(torch.tensor([float(value) for value in values], dtype=torch.float64).max())


def _scale(size: float) -> float:
    return max(size, torch.finfo(torch.float64).tiny)
