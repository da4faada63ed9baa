"""What a bias rule needs of a step beside the load: margins, as decided or under the router's new weight."""

import torch
from jaxtyping import Int
from torch import Tensor

from moe.kernels.route.logits import router_logits
from moe.layer.moe import MoE
from moe.routing import Tokens


@torch.no_grad()
def look(layer: MoE) -> Int[Tensor, "E bins"]:
    """The margins that were counted in a layer's step, or those of its sample under the router's weight of now.

    For the latter under FSDP2, where each device has a part of that weight, all of them take part, with or without
    tokens.

    Returns:
        int64, which adds up over devices.
    """
    router, balancer = layer.router, layer.balancer
    request, bias = balancer.request, router.score_bias
    assert request is not None
    assert bias is not None
    if request.ahead:
        whole = getattr(router.weight, "full_tensor", None)
        weight = router.weight if whole is None else whole()
        for tokens, mask in balancer.sample.take():
            logits = router_logits(tokens, weight, batch_invariant=router.batch_invariant)
            balancer.margins.count(router.decide(logits, Tokens(mask), None), bias)
    return balancer.margins.take(bias.device).long()
