"""What others do with a layer's decisions: look at them, write them down, have them repeated.

A compiled layer leaves its graph for any of these, or it would be compiled for each list and each place in it. What
torch.compile must not follow is marked when an object is made and not in the class: the mark imports the compiler.
"""

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Tensor

from moe.errors import ConfigError, ShapeError
from moe.types import Routing

Observer = Callable[[Routing, Routing], None]
"""Sees each new decision of a layer: as the router made it, and as it is carried out."""


@final
class Observers:
    """Who sees a layer's decisions."""

    def __init__(self) -> None:
        self.are_any = False
        self._all: list[Observer] = []
        self._shown: Observer | None = None

    def add(self, observer: Observer) -> None:
        """Show it all decisions from now on."""
        self._all.append(observer)
        self.are_any = True
        if self._shown is None:
            self._shown = torch.compiler.disable(self._show_all)

    def remove(self, observer: Observer) -> None:
        """Show it no more."""
        self._all.remove(observer)
        self.are_any = bool(self._all)

    def show(self, chosen: Routing, kept: Routing) -> None:
        """Show a decision to all."""
        assert self._shown is not None
        self._shown(chosen, kept)

    def _show_all(self, chosen: Routing, kept: Routing) -> None:
        for observer in self._all:
            observer(chosen, kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Observers":
        """Nobody has asked to see a copied layer."""
        return Observers()

    def __reduce__(self) -> tuple[type["Observers"], tuple[()]]:
        """Nor an unpickled one."""
        return Observers, ()


@final
class Script:
    """What a layer decides in its next calls.

    Args:
        decisions: expert ids of each call ``(T, S)`` int32, in order; what a layer's ``chosen.expert_ids`` were.
        is_written: calls are announced and written down here, instead of being read from here.
    """

    def __init__(self, decisions: Iterable[Int[Tensor, "_ _"]] = (), *, is_written: bool = False) -> None:
        self.decisions, self.is_written = list(decisions), is_written
        self._place = 0
        self.next = torch.compiler.disable(self._next)
        """Takes the number of tokens and of slots; see ``_next``."""
        self.write = torch.compiler.disable(self.decisions.append)
        """Takes what a call decided."""

    @property
    def left(self) -> int:
        """Decisions that no call has repeated yet."""
        return len(self.decisions) - self._place

    def _next(self, num_tokens: int, num_slots: int) -> Int[Tensor, "T S"]:
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
