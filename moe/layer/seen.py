"""What a bias rule needs of a step beside the load: margins, and how the scores have moved with the router's weight."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.balance import count_tokens
from moe.kernels.margins import BINS
from moe.kernels.route.logits import router_logits
from moe.layer.moe import MoE
from moe.routing import Tokens

_UNIT = 2.0**24
"""Scores are added as whole numbers of 2^-24, so that sums over devices do not depend on their order."""


@final
@dataclass(frozen=True)
class Seen:
    """Margins and drift as counts that add up over devices."""

    num_experts: int
    """E, null experts included."""

    has_drift: bool
    """Whether the drift was asked for."""

    counts: Int[Tensor, " C"]
    """int64; margins of E * BINS bins, then E sums of score changes, then the tokens of these."""

    def read(self) -> tuple[Int[Tensor, "E bins"], Float[Tensor, " E"] | None]:
        """The margins, and the mean drift of each expert where it was asked for."""
        margins, drift, tokens = self.counts.split([self.num_experts * BINS, self.num_experts, 1])
        mean = drift.double() / _UNIT / tokens.clamp(min=1)
        return margins.view(self.num_experts, BINS), mean.float() if self.has_drift else None


@torch.no_grad()
def look(layer: MoE) -> Seen:
    """What was kept of a layer's step, with its sample scored again under the router's weight of now.

    Under FSDP2 each device has a part of that weight, so all of them take part, with or without tokens.
    """
    router, balancer = layer.router, layer.balancer
    request, bias = balancer.request, router.score_bias
    assert request is not None
    assert bias is not None
    drift = torch.zeros(balancer.num_experts + 1, dtype=torch.int64, device=bias.device)
    if request.ahead or request.drift:
        whole = getattr(router.weight, "full_tensor", None)
        weight = router.weight if whole is None else whole()
        for tokens, before in balancer.sample.take():
            logits = router_logits(tokens, weight, batch_invariant=router.batch_invariant)
            if request.ahead:
                balancer.margins.count(router.decide(logits, Tokens(before.token_mask), None), bias)
            else:
                change = router.score(logits) - before.scores
                if before.token_mask is not None:
                    change = change.where(before.token_mask[:, None], 0.0)
                drift[:-1] += (change.double().sum(0) * _UNIT).round().long()
                drift[-1:] += count_tokens(before)
    margins = balancer.margins.take()
    if margins is None:
        margins = balancer.margins.zero(bias.device)
    return Seen(balancer.num_experts, request.drift, torch.cat([margins.flatten().long(), drift]))
