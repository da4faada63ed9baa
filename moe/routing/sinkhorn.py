"""Sinkhorn routing: a batch's choices from an assignment that is balanced softly."""

from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe.config import require_positive_integer
from moe.kernels.route import ScoreFunction, choose
from moe.routing.router import Router, Tokens


@final
class SinkhornRouter(Router):
    """In training mode the K largest entries of a token in a plan whose columns are balanced; else its K best logits.

    The plan is the softmax of the logits minus a price for each expert, such that every expert has the same sum over
    the tokens; the choice of the largest entries is balanced only about as well as the plan is sharp. Weights are the
    softmax scores of the chosen, without the prices, so that gradients reach the logits through them alone.

    **Training and evaluation differ**: without the other tokens there is no plan, so evaluation uses the logits, and
    the load is theirs.

    A token with a logit that is not finite changes no price.

    Takes no bias (the prices would undo it), no groups and no null experts.

    Args:
        args: as of ``Router``.
        iterations: of scaling columns and rows, a fixed number so that nothing waits for the device.
        options: as of ``Router``.

    Source: S-BASE, Clark et al. 2022 (arXiv 2202.01169); more than one expert a token as in Megatron-LM, which weighs
    by the softmax too, but for K = 1 by a sigmoid.
    """

    score_function = ScoreFunction.SOFTMAX
    takes_score_bias = False
    takes_groups = False
    takes_null_experts = False

    def __init__(self, *args: Any, iterations: int = 20, **options: Any) -> None:
        super().__init__(*args, **options)
        require_positive_integer(iterations=iterations)
        self.iterations = iterations

    @property
    def _runs_fused(self) -> bool:
        """In evaluation mode, where the K best logits are chosen and ``select`` is not called."""
        return not self.training

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)

    def select(
        self,
        logits: Float[Tensor, "T E"],
        scores: Float[Tensor, "T E"],  # noqa: ARG002
        tokens: Tokens,
    ) -> Int[Tensor, "T S"]:
        """The K best experts at their prices, in training mode."""
        # The order of a token's logits less prices is that of its row of the plan, and nothing underflows.
        values = logits - _prices(logits, tokens.mask, self.iterations)
        return choose(values, values, None, self.top_k, False, 1, 1)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"{super().extra_repr()}, iterations={self.iterations}"


def sinkhorn_plan(
    logits: Float[Tensor, "T E"], token_mask: Bool[Tensor, " T"] | None = None, iterations: int = 20
) -> Float[Tensor, "T E"]:
    """Scale ``exp(logits)`` so that each row sums to 1 and each column to tokens / E.

    Args:
        logits: float32 or better.
        token_mask: False for padding, whose rows are 0 and count for nothing.
        iterations: the rows are right after any number; the columns come closer with each.

    Returns:
        Not negative.

    Source: Sinkhorn and Knopp 1967; in the log domain, so that no logit over- or underflows.
    """
    plan = (logits - _prices(logits, token_mask, iterations)).softmax(-1)
    return plan if token_mask is None else plan.masked_fill(~token_mask[:, None], 0.0)


def _prices(logits: Tensor, token_mask: Tensor | None, iterations: int) -> Float[Tensor, " E"]:
    """What to subtract from each expert's logits, so that its softmax over experts sums to tokens / E.

    A token with a logit that is not finite takes no part: it would leave no price that is.
    """
    is_out = ~logits.isfinite().all(-1, keepdim=True)
    if token_mask is not None:
        is_out = is_out | ~token_mask[:, None]
    logits = logits.masked_fill(is_out, 0.0)
    prices = logits.new_zeros(logits.shape[1])
    for _ in range(iterations):
        rows = (logits - prices).log_softmax(-1).masked_fill(is_out, -torch.inf)
        prices = prices + rows.logsumexp(0)
        # Their level does not matter, and would rise by log(tokens / E) each time. NaN: there is no token at all.
        prices = (prices - prices.max()).nan_to_num(0.0)
    return prices
