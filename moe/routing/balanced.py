"""Balanced assignment: the best decision for a batch in which every expert has equally many tokens."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.kernels.route import ScoreFunction, choose
from moe.routing.assignment import balanced_assignment
from moe.routing.router import Router, Tokens


@final
class BalancedAssignmentRouter(Router):
    """In training mode the balanced assignment with the largest sum of logits; else each token's K best logits.

    Balanced: an expert has ``T * K / E`` of the batch's tokens, rounded down or up, and a token K distinct experts.

    **It waits for the device** in training mode: the assignment is solved on the host, in a loop whose length depends
    on the logits. It cannot be captured in a CUDA graph.

    **Training and evaluation differ**: the assignment needs the other tokens, earlier and later, so evaluation uses the
    logits, and the load is theirs.

    A token with a logit that is not finite takes its K best logits, and the others are balanced without it.

    Takes no bias (the assignment would undo it), no groups and no null experts.

    Source: BASE layers (Lewis et al. 2021, arXiv 2103.16716), which has K = 1 and the sigmoid as the weight. There an
    auction finds the assignment; here prices and exchanges do, see ``balanced_assignment``.
    """

    score_function = ScoreFunction.SIGMOID
    takes_score_bias = False
    takes_groups = False
    takes_null_experts = False

    @property
    def _runs_fused(self) -> bool:
        """In evaluation mode, where the K best logits are chosen and ``select`` is not called."""
        return not self.training

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Sigmoid of each logit."""
        return self.score_function.of(logits)

    def select(
        self,
        logits: Float[Tensor, "T E"],
        scores: Float[Tensor, "T E"],  # noqa: ARG002
        tokens: Tokens,
    ) -> Int[Tensor, "T S"]:
        """The experts of each token in the assignment, best first, in training mode."""
        return _assign(logits, tokens.mask, self.top_k)


# An operation of its own, so that a compiled layer calls it as it is.
@torch.library.custom_op("moe::balanced_assignment", mutates_args=())
def _assign(logits: Tensor, token_mask: Tensor | None, top_k: int) -> Tensor:
    """Expert ids ``(T, K)`` int32 of the balanced assignment; of padding, and of rows that are not finite, the best."""
    rows = logits.cpu()
    counts = rows.isfinite().all(-1)
    if token_mask is not None:
        counts = counts & token_mask.cpu()
    ids = choose(rows, rows, None, top_k, False, 1, 1)
    ids[counts] = torch.from_numpy(balanced_assignment(rows[counts].numpy(), top_k))
    return ids.to(logits.device)


@_assign.register_fake
def _(logits: Tensor, token_mask: Tensor | None, top_k: int) -> Tensor:  # noqa: ARG001
    return logits.new_empty(len(logits), top_k, dtype=torch.int32)
