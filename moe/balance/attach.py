"""How a loss that was computed without a graph still reaches the router, by way of a recomputation."""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from moe.errors import RecomputationError


@final
class Owed:
    """The gradient that the loss parts of a call are owed, from `collectable` to the call's recomputation."""

    def __init__(self) -> None:
        self.collected = False
        self.gradient: Tensor | None = None


def in_backward() -> bool:
    """Whether a backward pass is running, in which case a forward call is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def collectable(parts: Float[Tensor, " P"], owed: Owed) -> Float[Tensor, " P"]:
    """``parts``, such that their gradient reaches the router now or waits in ``owed`` for the recomputation."""
    if parts.requires_grad:
        return parts
    owed.collected = True
    anchor = torch.zeros_like(parts, requires_grad=True)
    collected: Tensor = _Collect.apply(anchor, parts, owed)
    return collected


def attach(y: Float[Tensor, "*batch D"], parts: Float[Tensor, " P"] | None, call: Any) -> Float[Tensor, "*batch D"]:
    """``y``, made to keep ``call`` alive with its graph and, in a recomputation, to hand ``parts`` their gradient.

    Args:
        y: the layer's output.
        parts: of the call's balance losses; None for none.
        call: a `moe.balance.Call`.
    """
    attached: Tensor = _Attach.apply(y, parts, call)
    return attached


class _Collect(torch.autograd.Function):
    """The values of parts that were computed without a graph; leaves their gradient in ``owed``."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parts: Tensor, owed: Owed) -> Tensor:
        ctx.owed = owed
        return anchor + parts

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.owed.gradient = gradient
        return gradient, None, None


class _Attach(torch.autograd.Function):
    """Identity on ``y``; gives ``parts`` the gradient that waits in the call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, _parts: Tensor | None, call: Any) -> Tensor:
        ctx.call = call
        ctx.recomputed = in_backward()
        ctx.mark_dirty(y)  # y itself and not a view of it, which nobody could change in place
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        owed: Owed = ctx.call.owed
        if not (ctx.recomputed and owed.collected):
            return gradient, None, None
        if owed.gradient is None:
            raise RecomputationError(
                "the balance loss of a layer under reentrant checkpointing has no gradient yet: call backward() once, "
                "on the sum of the training loss and moe.balance_loss(model), or checkpoint with use_reentrant=False"
            )
        return gradient, owed.gradient, None
