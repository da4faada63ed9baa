"""Expert choice: each expert takes its best tokens, so that all have equally many."""

import math
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import require_positive
from moe.errors import ConfigError
from moe.kernels.route import ScoreFunction
from moe.routing.router import Router, Tokens
from moe.routing.slots import count_slots, fill_slots

_NOISE = 1e-6
"""0.29 * 100 is a little below 29 in binary; such noise must not cost a place."""


@final
class ExpertChoiceRouter(Router):
    """Each expert takes the ``C = floor(capacity_factor * tokens * K / E)`` tokens with the highest scores for it.

    The load is even by construction. A token has K experts on average, from none to ``max_experts``; one that more
    experts chose keeps the best of them. Of equal tokens the earlier is taken.

    **It leaks**: whether an expert takes a token depends on the tokens after it, so a model trained with it sees a
    little of the future (arXiv 2408.15664, appendix D, bounds how much), and cannot generate token by token as it was
    trained. ``is_causal`` is False.

    Takes no bias, no groups and no null experts.

    Args:
        args: as of ``Router``.
        capacity_factor: experts a token on average, over K. Other than a layer's ``capacity_factor`` it drops nothing:
            it is what an expert takes.
        max_experts: the most experts of one token. None for no limit; a limit leaves experts less than full.
        normalize: divide a token's weights by their sum.
        options: as of ``Router``.

    Raises:
        ConfigError: from ``forward``, if C is 0 for tokens without a mask. (With a mask nobody knows without waiting
            for the device; then no token has an expert.)

    Source: Zhou et al. 2022 (arXiv 2202.09368, section 3.2).
    """

    score_function = ScoreFunction.SOFTMAX
    takes_score_bias = False
    takes_groups = False
    takes_null_experts = False
    is_causal = False

    def __init__(
        self,
        *args: Any,
        capacity_factor: float = 1.0,
        max_experts: int | None = None,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, normalize=normalize, **options)
        require_positive(capacity_factor=capacity_factor)
        self.capacity_factor = capacity_factor
        self._num_slots = count_slots(self.num_experts, max_experts)

    @property
    def num_slots(self) -> int:
        """The most experts of one token."""
        return self._num_slots

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)

    def select(
        self,
        logits: Float[Tensor, "T E"],  # noqa: ARG002
        scores: Float[Tensor, "T E"],
        tokens: Tokens,
    ) -> Int[Tensor, "T S"]:
        """The experts that took each token."""
        values, capacity = scores, self._capacity(scores.shape[0], tokens.mask)
        if tokens.mask is not None:
            values = scores.masked_fill(~tokens.mask[:, None], -1.0)  # behind all tokens that count
        order = torch.sort(values, dim=0, descending=True, stable=True).indices
        places = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
        rank = torch.empty_like(order).scatter_(0, order, places)
        return fill_slots(scores, rank < capacity, self.num_slots)

    def _capacity(self, num_tokens: int, mask: Bool[Tensor, " T"] | None) -> int | Int[Tensor, ""]:
        share = self.capacity_factor * self.top_k / self.num_experts
        if mask is not None:
            return (mask.sum().double() * share + _NOISE).long()
        capacity = math.floor(num_tokens * share + _NOISE)
        if num_tokens and not capacity:
            raise ConfigError(
                f"top_k={self.top_k} of num_experts={self.num_experts} with capacity_factor={self.capacity_factor} is "
                f"less than one of {num_tokens} tokens for each expert; give more tokens, top_k or capacity_factor"
            )
        return capacity

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}, num_slots={self.num_slots}"
