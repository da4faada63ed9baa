"""Noisy top-k: learnt noise on the logits, so that near experts share the tokens between them."""

from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn.functional import softplus

from moe.kernels.route import ScoreFunction
from moe.kernels.route.logits import router_logits
from moe.routing.router import Replay, Router, Tokens
from moe.types import Routing

_MIN_DEVIATION = 1e-6
"""Below it a probability's gradient would be 0 times infinity."""


@final
class NoisyTopKRouter(Router):
    """Normal noise on each logit, as strong as a second product of the token says; then softmax over the K best.

    Noise is added in training mode only: in evaluation mode the decision is that of the clean logits, and the load is
    theirs, which can be much less even. ``Routing.logits`` and ``scores`` are those with noise.

    ``Routing.selection_probability`` is, in training mode and without a ``score_bias``, how probable each expert is
    among the K best if only its own noise were drawn anew; the loss on the load needs it. (With a bias it is None: what
    is compared then are no longer the logits.)

    Takes no groups. Ranks that divide a block by ``tp`` must draw the same noise, so they need the same seed there.
    ``normalize=False`` weighs by the softmax over all experts instead.

    Source: Shazeer et al. 2017 (arXiv 1701.06538, equations 3-5 and, for the probability, 8-9 of appendix A). The
    weight of the noise starts at zero as there, which makes its deviation log 2; the router's own does not.

    Init:
        ``noise_weight (E + Z, D)``: zero.
    """

    score_function = ScoreFunction.SOFTMAX
    takes_groups = False
    adds_noise = True

    noise_weight: nn.Parameter

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noise_weight = nn.Parameter(torch.zeros_like(self.weight))

    def reset_parameters(self) -> None:
        """Draw the weight anew, and set the noise's weight and the bias to zero."""
        super().reset_parameters()
        if "noise_weight" in self._parameters:  # not while the base is being made
            nn.init.zeros_(self.noise_weight)

    def score(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Softmax over experts."""
        return self.score_function.of(logits)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        token_mask: Bool[Tensor, " T"] | None = None,
        replay: Replay | None = None,
        token_ids: Integer[Tensor, " T"] | None = None,
    ) -> Routing:
        """Decide where each token goes, see ``Router.forward``."""
        clean, tokens = self.logits(x), Tokens(token_mask, token_ids)
        if not self.training:
            return self.decide(clean, tokens, replay)
        strength = router_logits(x, self.noise_weight, batch_invariant=self.batch_invariant)
        deviation = softplus(strength).clamp(min=_MIN_DEVIATION)
        noisy = clean + torch.randn_like(clean) * deviation
        routing = self.decide(noisy, tokens, replay)
        if self.score_bias is not None:
            return routing
        return replace(routing, selection_probability=selection_probability(clean, noisy, deviation, self.top_k))


def selection_probability(
    clean: Float[Tensor, "T E"], noisy: Float[Tensor, "T E"], deviation: Float[Tensor, "T E"], top_k: int
) -> Float[Tensor, "T E"]:
    """How probable each expert is among the K best if its own noise were drawn anew and the others' stayed.

    Args:
        clean: logits without noise.
        noisy: logits with it.
        deviation: of the noise, positive.
        top_k: K.

    Returns:
        In [0, 1], with gradients to all three.

    Source: Shazeer et al. 2017 (arXiv 1701.06538, appendix A, equations 8-9).
    """
    if top_k == clean.shape[1]:
        return torch.ones_like(clean)
    best = noisy.topk(top_k + 1, -1).values
    kth, next_best = best[:, top_k - 1 : top_k], best[:, top_k:]
    # The K-th largest of the others: an expert among the K best is not counted itself.
    others = torch.where(noisy > next_best, next_best, kth)
    return torch.special.ndtr((clean - others) / deviation)
