"""Two verbs and the record between them; on one device both do nothing.

Sizes: T tokens of this device, R rows after an exchange, D dim, K experts per token.
"""

from dataclasses import dataclass
from typing import Protocol, final

from jaxtyping import Float
from torch import Tensor

from moe.types import Routing


@final
@dataclass(frozen=True)
class Dispatched:
    """The tokens whose experts live here, and the part of the decision that concerns these experts."""

    x: Float[Tensor, "R D"]
    routing: Routing
    """``expert_ids`` count the experts of this device from 0; -1 for experts elsewhere."""


class Dispatcher(Protocol):
    """Brings tokens to the devices of their experts, and partial outputs back."""

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Dispatched:
        """Send each token to every device that holds one of its experts."""

    def combine(self, y: Float[Tensor, "R D"], dispatched: Dispatched) -> Float[Tensor, "T D"]:
        """Bring the partial outputs back and add them up for each token, in the order of devices."""


@final
class LocalDispatcher:
    """All experts are here."""

    def dispatch(self, x: Float[Tensor, "T D"], routing: Routing) -> Dispatched:
        """The tokens as they are."""
        return Dispatched(x, routing)

    def combine(self, y: Float[Tensor, "T D"], dispatched: Dispatched) -> Float[Tensor, "T D"]:
        """The outputs as they are."""
        del dispatched
        return y
