"""Routers that differ in how a logit becomes a score; each sends a token to its K best experts."""

from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from moe.errors import ConfigError
from moe.kernels.route import ScoreFunction
from moe.routing.router import Router


@final
class SoftmaxRouter(Router):
    """Softmax over all experts, then top-k.

    With ``normalize`` the weights are those of top-k first and softmax over the kept logits after it: both are
    ``exp(logit)`` over the sum of the kept ones'.

    Source: Shazeer et al. 2017 (arXiv 1701.06538) without its noise; Mixtral (arXiv 2401.04088) with ``normalize``,
    DeepSeekMoE (arXiv 2401.06066, equations 3-5) without.
    """

    score_function = ScoreFunction.SOFTMAX

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)


@final
class SigmoidRouter(Router):
    """An independent sigmoid for each expert, then top-k.

    Source: DeepSeek-V3 (arXiv 2412.19437, equations 13-15), which normalises over the kept experts.
    """

    score_function = ScoreFunction.SIGMOID

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Sigmoid of each logit."""
        return self.score_function.of(logits)


@final
class SqrtSoftplusRouter(Router):
    """The square root of softplus of each logit, then top-k: positive like a sigmoid, but without an upper bound.

    Source: the reference code of DeepSeek-V4, which normalises over the kept experts.
    """

    score_function = ScoreFunction.SQRT_SOFTPLUS

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """``sqrt(log(1 + exp(logit)))`` of each logit."""
        return self.score_function.of(logits)


@final
class SwitchRouter(Router):
    """Softmax, then argmax: one expert a token, weighted by its probability.

    Source: Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 1-2). Selection is the argmax of the
    probabilities, the first of equals, as that paper has it.
    """

    score_function = ScoreFunction.SOFTMAX
    selects_by_score = True
    takes_groups = False

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, **options: Any) -> None:
        if top_k != 1:
            raise ConfigError(f"the router 'switch' sends each token to one expert, but top_k={top_k}; set top_k=1")
        super().__init__(dim, num_experts, top_k, **options)

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)
