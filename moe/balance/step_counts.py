"""What a whole optimizer step is known to have routed."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor


@final
@dataclass(frozen=True)
class StepCounts:
    """The integer sums over all calls and devices of one step that controllers move by.

    Integers add up to the same whatever the order, so these do not depend on how a batch was divided.
    """

    tokens_per_expert: Int[Tensor, " E"]
    """int64; assignments of each expert, before any capacity."""

    tokens: Int[Tensor, ""]
    """int64; tokens that count."""

    top_k: int
    """K, experts a token; on average, where the router decides how many."""

    margins: Int[Tensor, "E bins"] | None = None
    """int64; how many tokens miss an expert by how much, see `moe.kernels.margins`: in the decisions of this step, or
    under the router's weight after it with the bias of the step, whichever the rule asked for. None if it did not."""

    step: int = 0
    """How many steps of this layer's rule there were before this one."""

    @property
    def share(self) -> Float[Tensor, ""]:
        """The share of the tokens that an expert has at balance, float64: K/E, or less where tokens take fewer."""
        assignments, num_experts = self.tokens_per_expert.sum(), len(self.tokens_per_expert)
        return assignments.double() / (self.tokens.clamp(min=1) * num_experts)
