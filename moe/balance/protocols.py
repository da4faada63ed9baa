"""What a term of balance has to offer: the four kinds there are."""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from moe.balance.step_counts import StepCounts
from moe.types import Routing


@runtime_checkable
class BalanceLoss(Protocol):
    """Anything that turns a routing decision into a scalar to be minimised."""

    @property
    def coefficient(self) -> float:
        """Factor on the loss."""

    def __call__(self, routing: Routing) -> Float[Tensor, ""]:
        """The loss without its coefficient; 0 where no token counts."""


@runtime_checkable
class WeightLoss(Protocol):
    """Anything that turns the router's weight into a scalar to be minimised, whatever was routed."""

    @property
    def coefficient(self) -> float:
        """Factor on the loss."""

    def of_weight(self, weight: Float[Tensor, "E D"]) -> Float[Tensor, ""]:
        """The loss without its coefficient, in float32 or better.

        Args:
            weight: the router's, a row an expert.
        """


@runtime_checkable
class AdaptiveLoss(Protocol):
    """A loss whose strength follows what was routed."""

    def initial_state(self) -> Float[Tensor, " S"]:
        """What it remembers before the first step, float32 on the CPU."""

    def __call__(self, routing: Routing, state: Float[Tensor, " S"]) -> Float[Tensor, ""]:
        """The loss, its strength included; 0 where no token counts."""

    def updated(self, state: Float[Tensor, " S"], counts: StepCounts) -> Float[Tensor, " S"]:
        """The state for the next step; the same where no token counts. Does not wait for the device."""


@final
@dataclass(frozen=True)
class MarginRequest:
    """Which margins of a step a bias rule wants, see `moe.kernels.margins`."""

    tokens: int | None = None
    """Of each call, evenly spaced over it; None for all."""

    ahead: bool = False
    """Of these tokens scored again after the step, with the router's new weight, and not as they were decided."""


@runtime_checkable
class BiasRule(Protocol):
    """A controller: moves the bias that is added to scores for selection only, and is no loss.

    Route with the old bias, then update: the other order would let a token's routing depend on later tokens.
    """

    def margins_at(self, step: int) -> MarginRequest | None:
        """Which margins of a step are to be counted; None where the rule does not read them.

        Args:
            step: how many steps there were before it. A rule that wants any margins wants some at 0.
        """

    @property
    def state_rows(self) -> int:
        """How many numbers an expert it remembers between steps."""

    def updated(
        self, bias: Float[Tensor, " E"], state: Float[Tensor, "rows E"], counts: StepCounts
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, "rows E"]]:
        """Bias and state for the next step, the same where no token counts. Does not wait for the device.

        Args:
            bias: float32.
            state: float32, ``(state_rows, E)``; zeros before the first step.
            counts: of the step that has ended.
        """
