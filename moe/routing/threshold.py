"""Threshold routing: as many experts as it takes to be sure."""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.config import require_positive
from moe.errors import ConfigError
from moe.kernels.route import ScoreFunction
from moe.routing.router import Router, Tokens


@final
class ThresholdRouter(Router):
    """The fewest experts whose softmax scores sum to ``threshold``, at least one and at most K: top-p routing.

    A token that the router is sure about has one expert, others have more. A ``score_bias`` changes the order in which
    experts are taken; what is summed are the scores without it. Where nothing keeps the scores apart the router can
    learn to spread them and use K experts always (the paper adds a loss on their entropy).

    Args:
        args: as of ``Router``.
        threshold: p, in (0, 1].
        normalize: divide a token's kept scores by their sum. A token with one expert then weighs it by 1, and its
            router learns nothing from it.
        options: as of ``Router``.

    Source: Huang et al. 2024 (arXiv 2403.07652), there without a limit K.
    """

    score_function = ScoreFunction.SOFTMAX

    def __init__(self, *args: Any, threshold: float = 0.4, normalize: bool = False, **options: Any) -> None:
        super().__init__(*args, normalize=normalize, **options)
        require_positive(threshold=threshold)
        if threshold > 1:
            raise ConfigError(f"threshold={threshold} must be at most 1: the scores of all experts sum to 1")
        self.threshold = threshold

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)

    def select(self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"], tokens: Tokens) -> Int[Tensor, "T S"]:
        """The K best experts, without those behind the threshold."""
        best = super().select(logits, scores, tokens)
        sums = scores.gather(1, best.long()).cumsum(-1)
        others = best[:, 1:].masked_fill(sums[:, :-1] >= self.threshold, -1)
        return torch.cat([best[:, :1], others], 1)

    def extra_repr(self) -> str:
        """Options in the module's printed form."""
        return f"{super().extra_repr()}, threshold={self.threshold}"
