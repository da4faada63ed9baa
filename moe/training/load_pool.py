"""The load of experts over the last steps of a run, pooled so that chance counts for less."""

from collections import deque
from collections.abc import Mapping
from typing import Any, final

import torch

from moe.monitor import LoadStats


@final
class LoadPool:
    """Keeps each layer's load of the last ``steps`` steps, on the device where it was counted.

    Args:
        steps: how many steps to pool.
    """

    def __init__(self, steps: int) -> None:
        self._steps: deque[Mapping[str, LoadStats]] = deque(maxlen=steps)

    def add(self, loads: Mapping[str, LoadStats]) -> None:
        """Take in one step's load by layer, as ``moe.balance_step`` returns it."""
        self._steps.append(loads)

    def measures(self) -> dict[str, float | list[float]]:
        """The pooled figures under their keys in ``metrics.jsonl``; waits for the device."""
        line: dict[str, float | list[float]] = {}
        for layer, stats in self._pooled().items():
            line |= {f"balance/{name}/{layer}": value for name, value in stats.floats().items()}
            line[f"balance/load/{layer}"] = stats.load.tolist()
        return line

    def state_dict(self) -> list[dict[str, Any]]:
        """Every step's counts as plain numbers, so that a resumed run pools what an uninterrupted one would."""
        return [{layer: stats.to_numbers() for layer, stats in step.items()} for step in self._steps]

    def load_state_dict(self, state: list[dict[str, Any]], device: torch.device) -> None:
        """Go back to the steps that `state_dict` gave."""
        self._steps.clear()
        for step in state:
            self.add({layer: LoadStats.from_numbers(numbers, device) for layer, numbers in step.items()})

    def _pooled(self) -> dict[str, LoadStats]:
        total: dict[str, LoadStats] = {}
        for step in self._steps:
            for layer, stats in step.items():
                total[layer] = total[layer] + stats if layer in total else stats
        return total
