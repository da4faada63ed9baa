"""Figures of the last steps, handed on now and then."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, final

import torch

from moe.config import require_positive_integer
from moe.monitor import LoadStats

Figures: TypeAlias = Mapping[str, float]
"""Numbers by flat key, see `BalanceReporter.figures`."""

Sink: TypeAlias = Callable[[int, Figures], None]
"""Takes the optimizer steps done, and the figures."""

_WORST: Mapping[str, Callable[[Sequence[float]], float]] = {
    "max_vio": max,
    "cv": max,
    "entropy": min,
    "dead_experts": max,
    "drop_rate": max,
}
"""Figures of which one end is bad, and that end of several layers."""


@final
class BalanceReporter:
    """Pools what ``moe.balance_step`` returns over the last steps, and hands figures to sinks now and then.

    Counts stay on their device: only a report waits for it. Over several processes each calls ``moe.balance_step`` and
    `add`, and the first one alone reports. ::

        reporter = BalanceReporter(JsonLines("balance.jsonl"), every=100)
        for batch in batches:
            ...
            optimizer.step()
            reporter.add(moe.balance_step(model))

    Args:
        sinks: each is called with the step and the figures.
        every: steps from one report to the next.
        pool_steps: how many of the last steps a figure is of. The more, the less of it is chance, which
            ``max_vio_floor`` says. None: those since the last report.
        each_layer: figures of every layer; else of the worst alone.

    Raises:
        ConfigError: a number of steps is not positive.
    """

    def __init__(self, *sinks: Sink, every: int = 100, pool_steps: int | None = None, each_layer: bool = True) -> None:
        require_positive_integer(every=every)
        if pool_steps is not None:
            require_positive_integer(pool_steps=pool_steps)
        self.every, self.each_layer = every, each_layer
        self.step = 0
        """Optimizer steps done, as far as `add` was told."""
        self._sinks = sinks
        self._steps: deque[Mapping[str, LoadStats]] = deque(maxlen=pool_steps or every)

    def add(self, loads: Mapping[str, LoadStats], step: int | None = None, *, report: bool = True) -> None:
        """Take in a step, and report where one is due.

        Args:
            loads: by layer, as ``moe.balance_step`` returns them.
            step: optimizer steps done, this one included; None for one more than the last time. Give it where a run
                goes on from a checkpoint. One that is not above the last is of another run: the pool starts empty.
            report: False leaves the sinks alone, as all processes but the first should.
        """
        before, now = self.step, self.step + 1 if step is None else step
        if now <= before:
            self._steps.clear()
        if not self._steps:
            before = now - 1
        self.step = now
        self._steps.append(loads)
        # Steps may be counted by more than one: a report is due where a multiple of ``every`` was reached or passed.
        is_due = now // self.every > before // self.every
        if report and self._sinks and is_due and (figures := self.figures()):
            for sink in self._sinks:
                sink(now, figures)

    def figures(self) -> dict[str, float]:
        """The figures of the pooled steps; waits for the device.

        Returns:
            ``balance/<figure>/<layer>`` for each figure of ``LoadStats.floats()``, and ``balance/worst/<figure>`` for
            those of which one end is bad: of all layers the least even one's (the lowest entropy, the highest of the
            others). ``balance/worst/max_vio_floor`` is the floor of the layer with the highest MaxVio. A model that is
            itself a layer has no name for it: ``moe`` stands there. Empty before the first step.
        """
        layers = {name: _pooled(found).floats() for name, found in self._by_layer().items()}
        if not layers:
            return {}
        worst = {name: end([each[name] for each in layers.values()]) for name, end in _WORST.items()}
        worst["max_vio_floor"] = max(layers.values(), key=lambda each: each["max_vio"])["max_vio_floor"]
        flat = {f"balance/worst/{name}": value for name, value in worst.items()}
        if self.each_layer:
            for layer, each in layers.items():
                flat |= {f"balance/{name}/{layer or 'moe'}": value for name, value in each.items()}
        return flat

    def _by_layer(self) -> dict[str, list[LoadStats]]:
        layers: dict[str, list[LoadStats]] = {}
        for step in self._steps:
            for name, stats in step.items():
                layers.setdefault(name, []).append(stats)
        return layers


def _pooled(steps: Sequence[LoadStats]) -> LoadStats:
    """The sum of several steps of a layer, in four sums however many they are."""
    return replace(
        steps[0],
        tokens_per_expert=torch.stack([each.tokens_per_expert for each in steps]).sum(0),
        dropped=torch.stack([each.dropped for each in steps]).sum(0),
        tokens=torch.stack([each.tokens for each in steps]).sum(0),
        top_score_sum=torch.stack([each.top_score_sum for each in steps]).sum(0),
    )
