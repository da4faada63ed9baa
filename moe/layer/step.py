"""What is done to all layers of a model at once, in each forward pass and after each optimizer step."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moe.balance import PendingLoss, StepCounts, StepLoad
from moe.errors import ConfigError
from moe.layer.moe import MoE, PoolCounts, moe_layers
from moe.layer.seen import look
from moe.monitor import LoadStats

Collected = list[tuple[Tensor, PendingLoss]]


def balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """What to add to the training loss: the sum over layers of the balance losses of the calls since the last time.

    Call it once for each forward pass, before ``backward()``. Over several forward passes it is their mean, weighted
    by the tokens that count. Under gradient accumulation divide it as you divide the loss.

    Where losses are over the whole step (``scope="global"``), the devices tell each other the counts of all layers in
    one reduction. The step is then what has been counted so far, or all of it after ``moe.count_ahead``.

    Returns:
        Scalar; 0 for a model without MoE layers, without balance losses, or in evaluation mode.
    """
    taken = {layer: layer.calls.take() for _, layer in moe_layers(model)}
    loads = _step_loads(taken)
    losses = [layer.balancer.total(calls, loads.get(layer)) for layer, calls in taken.items() if calls]
    if not losses:
        parameter = next(model.parameters(), None)
        return torch.zeros((), device=None if parameter is None else parameter.device)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def balance_step(model: nn.Module, *, skipped: bool = False) -> dict[str, LoadStats]:
    """End an optimizer step: move the selection biases, and return each layer's load of the whole step.

    Call it once after ``optimizer.step()``. All calls in training mode since the last time count, so micro-batches add
    up; recomputations of activation checkpointing do not count. Devices that see other data tell each other the counts
    of all layers in one reduction; nothing here waits for the device.

    Args:
        model: any module that contains ``MoE`` layers.
        skipped: the optimizer step was left out (its loss was not finite, say), so the biases stay too.

    Returns:
        Load by layer name; layers that saw no call are left out, unless other devices may have seen one.

    Raises:
        ConfigError: a call that ``moe.count_ahead`` announced did not come.
    """
    layers = dict(moe_layers(model))  # once: to look through all modules takes longer than to count
    for name, layer in layers.items():
        if uncollected := layer.calls.end_step():
            warnings.warn(
                f"{uncollected} balance losses of layer {name!r} were never collected and balance nothing: add "
                "moe.balance_loss(model) to the training loss, or construct MoE with balance=()",
                stacklevel=2,
            )
    unrepeated = _end_scripts(layers)
    if unrepeated and not skipped:
        raise ConfigError(unrepeated)
    seen = {layer: look(layer) for layer in layers.values() if layer.balancer.request is not None}
    loads = _take({name: (layer, layer.training_load.take()) for name, layer in layers.items()}, seen)
    for name, layer in layers.items():
        layer.balancer.end_step()
        if name in loads and not skipped:
            load, number = loads[name], layer.balancer.step_number
            counts = StepCounts(load.tokens_per_expert, load.tokens, layer.top_k, seen.get(layer), number)
            layer.balancer.step(layer.router.score_bias, counts)
    return loads


def take_evaluation_load(model: nn.Module) -> dict[str, LoadStats]:
    """Each layer's load of the calls in evaluation mode since the last time; layers without a call are left out."""
    return _take({name: (layer, layer.evaluation_load.take()) for name, layer in moe_layers(model)}, {})


def pool(counts: Mapping[MoE, Int[Tensor, "..."]]) -> dict[MoE, Tensor]:
    """Counts of layers summed over the devices that see other tokens: one reduction for all layers.

    Args:
        counts: int64, of each layer of the same shape on all devices.
    """
    pooled = dict(counts)
    spread: dict[PoolCounts, list[MoE]] = {}
    for layer in counts:
        if layer.pool_counts is not None:
            spread.setdefault(layer.pool_counts, []).append(layer)
    for pool_counts, layers in spread.items():
        pooled |= zip(layers, pool_counts([counts[layer] for layer in layers]))
    return pooled


def ranks_of(layer: MoE) -> int:
    """How many devices see other tokens than each other."""
    return 1 if layer.pool_counts is None else layer.pool_counts.ranks


def _step_loads(taken: Mapping[MoE, Collected]) -> dict[MoE, StepLoad]:
    """What the losses over a step need, of the layers that have such losses."""
    loads, unknown = {}, {}
    for layer, calls in taken.items():
        if not layer.balancer.step_losses:
            continue
        if (planned := layer.balancer.planned) is not None:
            loads[layer] = replace(planned, parts=planned.parts / max(len(calls), 1))
        elif calls or layer.pool_counts is not None:
            unknown[layer] = _counts_of(layer, calls)
    for layer, counts in pool(unknown).items():
        so_far = layer.balancer.add(counts[:-1])
        loads[layer] = StepLoad(so_far, counts[-1], ranks_of(layer))
    return loads


def _counts_of(layer: MoE, calls: Collected) -> Int[Tensor, " C"]:
    """Assignments of each expert in some calls, and how many tokens counted there."""
    counts = torch.zeros(layer.balancer.num_experts + 1, dtype=torch.int64, device=layer.router.weight.device)
    for _, pending in calls:
        assert pending.tokens_per_expert is not None
        counts = counts + torch.cat([pending.tokens_per_expert, pending.num_tokens[None]])
    return counts


def _end_scripts(layers: Mapping[str, MoE]) -> str:
    """End the announced step of all layers; returns what is wrong if a layer did not repeat all of it."""
    wrong = ""
    for name, layer in layers.items():
        script = layer.script
        if script is None or (layer.balancer.planned is None and not script.is_written):
            continue  # moe.replay_routing ends its own
        layer.script = None
        if script.left:
            wrong = (
                f"layer {name!r} repeated {len(script.decisions) - script.left} of {len(script.decisions)} decisions: "
                "each forward pass in moe.count_ahead must come again before moe.balance_step, in the same order"
            )
    return wrong


def _take(found: Mapping[str, tuple[MoE, LoadStats | None]], seen: dict[MoE, Tensor]) -> dict[str, LoadStats]:
    """Loads over all devices, and in place what was seen; of spread layers also those without a call here."""
    loads = {name: load for name, (_, load) in found.items() if load is not None}
    counts: dict[MoE, Tensor] = {}
    for _, (layer, load) in found.items():
        if layer.pool_counts is not None:
            more = (seen[layer].flatten(),) if layer in seen else ()
            counts[layer] = torch.cat([_own(layer, load).to_counts(), *more])
    pooled = pool(counts)
    for name, (layer, load) in found.items():
        if layer in pooled:
            own = _own(layer, load)
            size = len(own.to_counts())
            loads[name] = LoadStats.from_counts(pooled[layer][:size], own.num_null_experts)
            if layer in seen:
                seen[layer] = pooled[layer][size:].view_as(seen[layer])
    return {name: loads[name] for name in found if name in loads}


def _own(layer: MoE, load: LoadStats | None) -> LoadStats:
    if load is not None:
        return load
    nulls = layer.router.num_null_experts
    return LoadStats.zero(layer.balancer.num_experts, layer.router.weight.device, nulls)
