"""ReLU routing: a token goes wherever its logit is positive."""

from typing import Any, final

from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import ConfigError
from moe.routing.router import Router, Tokens
from moe.routing.slots import count_slots, fill_slots


@final
class ReluRouter(Router):
    """An expert is active where its logit is above zero, and weighs as much as that.

    The output is continuous in the logits: an expert comes and goes with weight 0. How many experts a token has is for
    the router to learn, and can be none; ``top_k`` is the average that the adaptive L1 loss of ``moe.balance`` drives
    it to. Without such a loss about half of all experts are active from the start.

    Takes no bias, no groups and no null experts.

    Args:
        args: as of ``Router``.
        max_experts: the most experts of one token, the best, at least K: where it is K itself, every token has to have
            that many for an average of K. None for no limit; a limit costs the continuity.
        normalize: divide a token's weights by their sum.
        options: as of ``Router``.

    Raises:
        ConfigError: max_experts is less than top_k, an average that would be out of reach.

    Source: ReMoE (Wang et al. 2024, arXiv 2412.14711, section 3.2), without limit and normalisation.
    """

    takes_score_bias = False
    takes_groups = False
    takes_null_experts = False

    def __init__(self, *args: Any, max_experts: int | None = None, normalize: bool = False, **options: Any) -> None:
        super().__init__(*args, normalize=normalize, **options)
        self._num_slots = count_slots(self.num_experts, max_experts)
        if self._num_slots < self.top_k:
            raise ConfigError(
                f"max_experts={max_experts} must be at least top_k={self.top_k}, the experts a token on average"
            )

    @property
    def num_slots(self) -> int:
        """The most experts of one token."""
        return self._num_slots

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The logit where it is positive, else 0."""
        return logits.relu()

    def select(
        self,
        logits: Float[Tensor, "T E"],
        scores: Float[Tensor, "T E"],  # noqa: ARG002
        tokens: Tokens,  # noqa: ARG002
    ) -> Int[Tensor, "T S"]:
        """The experts with positive logits, and those with NaN, which so reaches the output and is seen."""
        return fill_slots(logits, ~(logits <= 0), self.num_slots)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"{super().extra_repr()}, num_slots={self.num_slots}"
