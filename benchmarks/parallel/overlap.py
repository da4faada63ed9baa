"""How long an exchange ran while experts computed, from the profiler's record of one rank."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

from torch.profiler import ProfilerActivity, profile

EXPERTS = ("moe::experts", "moe::experts_backward")
EXCHANGE = ("gloo:all_to_all",)

Span = tuple[float, float]


@final
@dataclass(frozen=True)
class Overlap:
    """Seconds of one step on one rank."""

    experts: float
    """They computed."""
    exchange: float
    """At least one exchange ran on gloo's threads."""
    both: float
    """Both at once."""


def measure_overlap(step: Callable[[], object], steps: int) -> Overlap:
    """The mean of some steps; every rank calls it.

    Args:
        step: forward and backward.
        steps: how many.

    Raises:
        RuntimeError: the profiler saw no experts or no exchange, so that a 0 would mean nothing.
    """
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            step()
    found = {names: [] for names in (EXPERTS, EXCHANGE)}  # type: dict[tuple[str, ...], list[Span]]
    for event in record.events() or ():
        for names, spans in found.items():
            if event.name in names:
                spans.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    for names, spans in found.items():
        if not spans:
            raise RuntimeError(f"the profiler saw none of {', '.join(names)} in {steps} steps")
    experts, exchange = (merge(spans) for spans in found.values())
    return Overlap(*(total(spans) / steps for spans in (experts, exchange, common(experts, exchange))))


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that neither touch nor overlap, ascending."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    """When both are; each of spans that do not overlap."""
    pairs = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return [(start, end) for start, end in pairs if start < end]


def total(spans: Iterable[Span]) -> float:
    """Their length."""
    return sum(end - start for start, end in spans)
