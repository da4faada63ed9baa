"""Decisions of a layer in order, to be repeated."""

from collections.abc import Iterable
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from moe.errors import ConfigError, ShapeError


@final
class Script:
    """What a layer decides in its next calls. A compiled layer leaves its graph to read or write it.

    Args:
        decisions: expert ids of each call ``(T, S)`` int32, in order; what a layer's ``chosen.expert_ids`` were.
        is_written: calls are announced and written down here, instead of being read from here.
    """

    def __init__(self, decisions: Iterable[Int[Tensor, "_ _"]] = (), *, is_written: bool = False) -> None:
        self.decisions, self.is_written = list(decisions), is_written
        self._place = 0

    @torch.compiler.disable
    def write(self, expert_ids: Int[Tensor, "T S"]) -> None:
        """Note what a call decided."""
        self.decisions.append(expert_ids)

    @property
    def left(self) -> int:
        """Decisions that no call has repeated yet."""
        return len(self.decisions) - self._place

    @torch.compiler.disable
    def next(self, num_tokens: int, num_slots: int) -> Int[Tensor, "T S"]:
        """What the next call decides.

        Raises:
            ConfigError: all decisions have been repeated.
            ShapeError: the next decision is of another number of tokens or slots.
        """
        if not self.left:
            raise ConfigError(f"all {len(self.decisions)} recorded decisions of this layer have been repeated already")
        found = self.decisions[self._place]
        if found.shape != (num_tokens, num_slots):
            raise ShapeError(
                f"recorded decision {self._place} has shape {tuple(found.shape)}, but the call decides on "
                f"{(num_tokens, num_slots)}: (tokens, slots)"
            )
        self._place += 1
        return found
