"""Faults on a token's way to its experts and back.

Each function takes what it calls once it has changed something, and returns what it replaces.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe.parallel import dispatcher, experts, replicas
from moe.parallel.dispatcher import ExpertParallel
from moe.parallel.experts import Shard
from moe.verify.planting import PARALLELIZE, Fire, Patch


def drop_last_round(fire: Fire) -> list[Patch]:
    """The last of several rounds returns zeros."""

    def without_last(original: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def run(*args: Any) -> list[Tensor]:
            returned = original(*args)
            if len(returned) > 1 and returned[-1].numel():
                fire()
                returned[-1] = returned[-1] * 0
            return returned

        return run

    names = ("_overlapped", "_one_by_one")
    return [(ExpertParallel, name, without_last(getattr(ExpertParallel, name))) for name in names]


def reverse_received(fire: Fire) -> list[Patch]:
    """Tokens arrive from the last to the first, ids and weights from the first to the last."""
    original = dispatcher.arrive

    def arrive(transfer: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        arrived = original(transfer, *tensors)
        if len(arrived) == 1 or len(arrived[0]) < 2:
            return arrived
        fire()
        return arrived[0].flip(0), *arrived[1:]

    return [(dispatcher, "arrive", arrive)]


def weights_of_one(fire: Fire) -> list[Patch]:
    """Every expert of a token counts fully."""
    return _described(fire, lambda ids, weights: weights * 0 + (ids >= 0))


def detached_weights(fire: Fire) -> list[Patch]:
    """No gradient reaches the router through the weights."""
    return _described(fire, lambda _ids, weights: weights.detach())


def _described(fire: Fire, change: Callable[[Tensor, Tensor], Tensor]) -> list[Patch]:
    original = ExpertParallel._concerning

    def concerning(*args: Any) -> tuple[Tensor, Tensor]:
        ids, weights = original(*args)
        changed = change(ids, weights)
        if changed.requires_grad != weights.requires_grad or not torch.equal(changed, weights):
            fire()
        return ids, changed

    return [(ExpertParallel, "_concerning", concerning)]


def no_deduplication(fire: Fire) -> list[Patch]:
    """A row for each of a token's experts instead of one for each rank."""
    original = dispatcher.destinations

    def destinations(expert_ids: Tensor, bounds: Sequence[int], copies: int) -> Tensor:
        each = [original(ids, bounds, copies) for ids in expert_ids.split(1, dim=1)]
        repeated = torch.cat(each, 1)
        if int((repeated >= 0).sum()) > int((original(expert_ids, bounds, copies) >= 0).sum()):
            fire()
        return repeated

    return [(dispatcher, "destinations", destinations)]


def down_bias_everywhere(fire: Fire) -> list[Patch]:
    """The ranks with later slices of the hidden dimension keep the bias as well."""
    original = experts.shard_experts

    def shard(layer: Any, mesh: Any) -> dict[str, Shard]:
        whole = layer.down_bias
        shards = original(layer, mesh)
        if whole is not None and layer.down_bias is None:
            fire()
            own = shards["up_weight"].pieces[0][0]
            shards["down_bias"] = Shard(tuple(whole.shape), ((own, slice(0, whole.shape[1])),), 1, ("ep",))
            layer.down_bias = nn.Parameter(whole.detach()[own].clone())
        return shards

    return [(PARALLELIZE, "shard_experts", shard)]


def lose_remainder(fire: Fire) -> list[Patch]:
    """Zeros for the rows beyond a multiple of the group's size."""
    original = replicas.join_alike

    def join_alike(part: Tensor, length: int, group: Any) -> Tensor:
        whole = original(part, length, group)
        beyond = length % group.size()
        if not beyond:
            return whole
        fire()
        kept = torch.arange(length) < length - beyond
        return whole * kept[None, :, None].to(whole.dtype)

    return [(replicas, "join_alike", join_alike)]
