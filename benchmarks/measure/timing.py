"""Time, with all contestants taking turns in one process."""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import final

import torch
from peers.contestant import Contestant


class Clock(ABC):
    """Times one call."""

    @abstractmethod
    def seconds(self, work: Callable[[], object]) -> float:
        """How long a call takes until its results are there."""


@final
class WallClock(Clock):
    """For the CPU. Nothing is flushed: the tensors of a case are larger than its caches."""

    def seconds(self, work: Callable[[], object]) -> float:
        """By the clock on the wall."""
        start = time.perf_counter()
        result = work()  # a name, so that freeing it is not timed
        end = time.perf_counter()
        del result
        return end - start


@final
class EventClock(Clock):
    """For a GPU: events around the work, on a cold L2, so that launches overlap as they do in training.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: str) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Between two events on the current stream."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The write takes longer than a launch, so that the GPU is still busy when the first launches of the work come.
        self.flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


@final
@dataclass(frozen=True)
class Times:
    """Seconds by round, of one contestant."""

    step: list[float] = field(default_factory=list)
    """Forward and backward."""
    forward: list[float] = field(default_factory=list)
    """Forward alone, without gradients."""


@final
@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)


def race(contestants: Mapping[str, Contestant], clock: Clock, rounds: int, warmup: int) -> dict[str, Times]:
    """Time all contestants in turns.

    A round is one step and one forward pass of each. Who begins moves on by one from round to round, so that nobody
    always follows the same neighbour, and a slow minute of the machine hits all alike.

    Args:
        contestants: by name.
        clock: what measures.
        rounds: that count.
        warmup: rounds before them that do not.
    """
    names = list(contestants)
    times = {name: Times() for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        with _collected():
            for name in names[first:] + names[:first]:
                contestant = contestants[name]
                contestant.ready(training=True)
                step = clock.seconds(contestant.step)
                contestant.ready(training=False)
                with torch.no_grad():
                    forward = clock.seconds(contestant.forward)
                if number >= 0:
                    times[name].step.append(step)
                    times[name].forward.append(forward)
    return times


@contextmanager
def _collected() -> Iterator[None]:
    """Python's garbage is collected before a round, not in the middle of somebody's step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def over(times: list[float], floor: list[float]) -> Spread:
    """The ratio to the floor of the same round."""
    return Spread.of([mine / its for mine, its in zip(times, floor)])
