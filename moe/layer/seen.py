"""What a bias rule needs of a step beside the load: margins, as decided and under the router's new weight."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from moe.balance import MarginCounter, MarginRequest
from moe.kernels.margins import BINS
from moe.kernels.route.logits import router_logits
from moe.layer.moe import MoE
from moe.routing import Tokens


@final
@dataclass(frozen=True)
class Seen:
    """Margins, in a form that adds up over devices."""

    num_experts: int
    """E, null experts included."""

    request: MarginRequest
    """What was asked for."""

    counts: Int[Tensor, " C"]
    """int64; the E * BINS margins as decided, those under the new weight, or both."""

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """The two histograms ``(E, BINS)``; None for one that was not asked for."""
        found = list(self.counts.view(-1, self.num_experts, BINS))
        return found.pop(0) if self.request.decided else None, found.pop(0) if self.request.ahead else None


@torch.no_grad()
def look(layer: MoE) -> Seen:
    """The margins that were counted in a layer's step, and those of its sample under the router's weight of now.

    Under FSDP2 each device has a part of that weight, so all of them take part, with or without tokens.
    """
    router, balancer = layer.router, layer.balancer
    request, bias = balancer.request, router.score_bias
    assert request is not None
    assert bias is not None
    counters = [balancer.margins] if request.decided else []
    if request.ahead:
        ahead = MarginCounter(balancer.num_experts)
        counters.append(ahead)
        whole = getattr(router.weight, "full_tensor", None)
        weight = router.weight if whole is None else whole()
        for tokens, mask in balancer.sample.take():
            logits = router_logits(tokens, weight, batch_invariant=router.batch_invariant)
            ahead.count(router.decide(logits, Tokens(mask), None), bias)
    counts = torch.cat([counter.take(bias.device).flatten() for counter in counters]).long()
    return Seen(balancer.num_experts, request, counts)
