"""The routers: siblings that differ in how a logit becomes a score, and a score a weight."""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import ConfigError
from moe.routing.router import Router, chosen_scores, gather_chosen


@final
class SoftmaxRouter(Router):
    """Softmax over all experts, then top-k.

    ``weights = scores[top-k]``, divided by their sum where ``normalize``.

    Source: Shazeer et al. 2017 (arXiv 1701.06538) without its noise; Mixtral (arXiv 2401.04088) with ``normalize``,
    DeepSeekMoE (arXiv 2401.06066, equations 3-5) without.
    """

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return logits.softmax(-1)

    def weigh(
        self, scores: Float[Tensor, "T E"], logits: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """Scores of the chosen experts, normalised if asked."""
        del logits
        return chosen_scores(scores, expert_ids, self.normalize)


@final
class TopKSoftmaxRouter(Router):
    """Top-k of the logits, then softmax over the kept ones, so that weights add up to ``scale``.

    ``scores`` are the softmax over all experts, for the losses. Equal in value to ``SoftmaxRouter(normalize=True)``,
    but for what float32 rounds away; it stays exact where the kept experts' share of the full softmax underflows.

    Source: Shazeer et al. 2017 (arXiv 1701.06538, equations 3 and 5); GPT-OSS (arXiv 2508.10925).
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, *, normalize: bool | None = None, **options: Any
    ) -> None:
        if normalize is False or top_k == 1:
            raise ConfigError(
                f"the router 'top_k_softmax' always normalizes, so top_k=1 would teach it nothing and "
                f"normalize=False has "
                f"no meaning (top_k={top_k}, normalize={normalize}); use 'softmax'"
            )
        super().__init__(dim, num_experts, top_k, normalize=normalize, **options)

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return logits.softmax(-1)

    def weigh(
        self, scores: Float[Tensor, "T E"], logits: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """Softmax over the chosen logits."""
        del scores
        # Not -inf: a token without any expert would get the softmax of nothing, NaN.
        return gather_chosen(logits, expert_ids, torch.finfo(logits.dtype).min).softmax(-1)


@final
class SigmoidRouter(Router):
    """An independent sigmoid for each expert, then top-k.

    Source: DeepSeek-V3 (arXiv 2412.19437, equations 13-15), which normalises over the kept experts.
    """

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Sigmoid of each logit."""
        return logits.sigmoid()

    def weigh(
        self, scores: Float[Tensor, "T E"], logits: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """Scores of the chosen experts, normalised if asked."""
        del logits
        return chosen_scores(scores, expert_ids, self.normalize)


@final
class SwitchRouter(Router):
    """Softmax, then argmax: one expert a token, weighted by its probability.

    Source: Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 1-2). Selection is the argmax of the
    probabilities, the first of equals, as that paper has it.
    """

    selects_by_score = True

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 1, *, normalize: bool | None = None, **options: Any
    ) -> None:
        if top_k != 1:
            raise ConfigError(f"the router 'switch' sends each token to one expert, but top_k={top_k}; set top_k=1")
        super().__init__(dim, num_experts, top_k, normalize=normalize, **options)

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return logits.softmax(-1)

    def weigh(
        self, scores: Float[Tensor, "T E"], logits: Float[Tensor, "T E"], expert_ids: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """Scores of the chosen experts (one a token, never normalised)."""
        del logits
        return chosen_scores(scores, expert_ids, self.normalize)


ROUTERS: dict[str, type[Router]] = {
    "softmax": SoftmaxRouter,
    "top_k_softmax": TopKSoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "switch": SwitchRouter,
}
"""Routers by the name that ``moe.MoE(router=...)`` takes."""
