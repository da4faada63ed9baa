"""Decisions of a model that are kept: to look at, to repeat, and to know a step before it is taken."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moe.balance import StepLoad, count_tokens
from moe.errors import ConfigError, DtypeError
from moe.layer.moe import MoE, moe_layers
from moe.layer.script import Script
from moe.layer.step import pool, ranks_of
from moe.types import Routing

Decisions = Mapping[str, Sequence[Int[Tensor, "_ _"]]]
"""By layer name the expert ids of each call, in order; int32, -1 for none."""


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Keep the decisions of all calls of a model's layers, in training and in evaluation mode, without gradients.

    Recomputations of activation checkpointing are no calls. What is kept stays on its device.

    Yields:
        By layer name the decision of each call so far, as the router made it.
    """
    kept: dict[str, list[Routing]] = {name: [] for name, _ in moe_layers(model)}

    def observe(name: str, chosen: Routing, _kept: Routing) -> None:
        kept[name].append(chosen.detach())

    observers = [(layer, partial(observe, name)) for name, layer in moe_layers(model)]
    for layer, observer in observers:
        layer.observers.add(observer)
    try:
        yield kept
    finally:
        for layer, observer in observers:
            layer.observers.remove(observer)


@contextmanager
def replay_routing(model: nn.Module, decisions: Decisions) -> Iterator[None]:
    """Calls of a model's layers take recorded decisions; scores, weights and gradients are those of their own tokens.

    For reinforcement learning, whose training step should route tokens as the rollout did, and to compare models under
    the same decisions. ``{name: [routing.expert_ids for routing in calls] for name, calls in kept.items()}`` is what
    `record_routing` kept.

    Args:
        model: any module that contains ``MoE`` layers.
        decisions: of the calls to come, of each layer or of some of them.

    Raises:
        ConfigError: a layer is unknown, repeats something already, is called more often than there are decisions, or
            less often; or an id is out of range. Looking at ids waits for their device, once.
        DtypeError: ids are not int32.
        ShapeError: a decision is of another number of tokens or slots.
    """
    layers = dict(moe_layers(model))
    if unknown := sorted(decisions.keys() - layers.keys()):
        raise ConfigError(f"decisions has layer {unknown[0]!r}; the model's MoE layers are {', '.join(layers)}")
    if busy := [name for name in decisions if layers[name].script is not None]:
        raise ConfigError(f"layer {busy[0]!r} repeats other decisions already, or was announced by moe.count_ahead")
    for name, ids in decisions.items():
        _check_ids(name, ids, layers[name].balancer.num_experts)
    for name, ids in decisions.items():
        layers[name].script = Script(each.to(layers[name].router.weight.device) for each in ids)
    try:
        yield
        for name in decisions:
            script = layers[name].script
            if script is not None and script.left:
                raise ConfigError(f"{script.left} of {len(script.decisions)} decisions of layer {name!r} are left over")
    finally:
        for name in decisions:
            layers[name].script = None


def _check_ids(name: str, decisions: Sequence[Tensor], num_experts: int) -> None:
    for place, ids in enumerate(decisions):
        if ids.dtype != torch.int32:
            raise DtypeError(f"decision {place} of layer {name!r} is {ids.dtype}; expert ids are torch.int32")
        low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (-1, -1)
        if low < -1 or high >= num_experts:
            raise ConfigError(
                f"decision {place} of layer {name!r} has ids {low} to {high}; they must be -1 to {num_experts - 1}"
            )


@contextmanager
def count_ahead(model: nn.Module) -> Iterator[None]:
    """Announce the micro-batches of a step, so that balance losses over the whole step know it from the first one on.

    Under gradient accumulation a loss over the step (``scope="global"``) needs the counts of micro-batches that are
    still to come. Send all of them through the model in here, without gradients, and then again to train on, in the
    same order; the second time they repeat their decisions. Losses and gradients are then exactly those of one batch
    that holds them all, for the price of another forward pass, if each layer is called equally often in each
    micro-batch; under dropout or a noisy router, of one batch that had the draws of the first time. Compiled layers
    leave their graphs meanwhile. ::

        with moe.count_ahead(model):
            for batch in micro_batches:
                model(batch)
        for batch in micro_batches:
            ((loss(model(batch)) + moe.balance_loss(model)) / len(micro_batches)).backward()

    Raises:
        ConfigError: the model is in evaluation mode, or a step that was announced has not ended.
    """
    layers = [layer for _, layer in moe_layers(model)]
    for layer in layers:
        if not layer.training:
            raise ConfigError(
                "count_ahead announces a training step, but the model is in evaluation mode: model.train()"
            )
        if layer.script is not None:
            raise ConfigError("count_ahead was called twice; end the step that was announced with moe.balance_step")
    for layer in layers:
        layer.script = Script(is_written=True)
    try:
        with torch.no_grad(), _counting(layers) as counts:
            yield
    except BaseException:
        for layer in layers:
            layer.script = None
        raise
    for layer, total in pool(counts).items():
        assert layer.script is not None
        written = layer.script.decisions
        layer.script = Script(written)
        layer.balancer.planned = StepLoad(total[:-1], total[-1], float(ranks_of(layer) * len(written)))


@contextmanager
def _counting(layers: Sequence[MoE]) -> Iterator[dict[MoE, Tensor]]:
    """Add up assignments and tokens of the calls of layers."""
    counts = {
        layer: torch.zeros(layer.balancer.num_experts + 1, dtype=torch.int64, device=layer.router.weight.device)
        for layer in layers
    }

    def count(layer: MoE, chosen: Routing, _kept: Routing) -> None:
        counts[layer] += torch.cat([chosen.tokens_per_expert(), count_tokens(chosen)[None]])

    observers = [(layer, partial(count, layer)) for layer in layers]
    for layer, observer in observers:
        layer.observers.add(observer)
    try:
        yield counts
    finally:
        for layer, observer in observers:
            layer.observers.remove(observer)
