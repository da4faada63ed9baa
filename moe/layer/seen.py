"""What a bias rule needs of a step beside the load: margins, as decided and under the router's new weight."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor

from moe.balance import MarginCounter
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

    counts: Int[Tensor, " C"]
    """int64; E * BINS margins as decided, then as many under the new weight."""

    def read(self) -> tuple[Int[Tensor, "E bins"], Int[Tensor, "E bins"]]:
        """The two histograms; of zeros where they were not asked for."""
        decided, ahead = self.counts.view(2, self.num_experts, BINS).unbind()
        return decided, ahead


@torch.no_grad()
def look(layer: MoE) -> Seen:
    """The margins that were counted in a layer's step, and those of its sample under the router's weight of now.

    Under FSDP2 each device has a part of that weight, so all of them take part, with or without tokens.
    """
    router, balancer = layer.router, layer.balancer
    request, bias = balancer.request, router.score_bias
    assert request is not None
    assert bias is not None
    ahead = MarginCounter(balancer.num_experts)
    if request.ahead:
        whole = getattr(router.weight, "full_tensor", None)
        weight = router.weight if whole is None else whole()
        for tokens, mask in balancer.sample.take():
            logits = router_logits(tokens, weight, batch_invariant=router.batch_invariant)
            ahead.count(router.decide(logits, Tokens(mask), None), bias)
    found = (counter.take(bias.device).flatten() for counter in (balancer.margins, ahead))
    return Seen(balancer.num_experts, torch.cat([*found]).long())
