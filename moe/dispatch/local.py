"""What runs a layer's experts on its tokens; on one device, a plain call.

Sizes: T tokens of this device, D dim, K experts per token.
"""

from collections.abc import Callable
from typing import Protocol, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from moe.types import Routing

Experts = Callable[[Tensor, Routing], Tensor]
"""The experts that live here: ``(R, D)`` and their ids, counted from 0 with -1 for experts elsewhere, to each token's
sum over its experts here ``(R, D)``."""


@runtime_checkable
class Dispatcher(Protocol):
    """Brings tokens to the devices of their experts, and partial outputs back."""

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The sum of each token's experts, wherever they are.

        Args:
            experts: those of this device; called as often as tokens come.
            x: the tokens of this device.
            routing: their experts, counted over all devices.
        """


@final
class LocalDispatcher:
    """All experts are here."""

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The experts' own sum."""
        return experts(x, routing)
