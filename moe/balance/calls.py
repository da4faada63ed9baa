"""The forward calls of one layer, so that each is decided once, counted once and penalised once.

Activation checkpointing runs a layer's forward twice: once in the forward pass, and again inside the backward pass. The
second run must replay the first one's decision, whatever it would decide itself, and must count nothing. It is
recognised by running inside a backward pass; which call it repeats is clear where only one is open, and otherwise the
open call whose decision agrees best.

The balance loss reaches the router in one of two ways:

* Where the forward pass builds a graph (no checkpointing, or the non-reentrant kind), the loss is simply part of it.
* Reentrant checkpointing runs the forward pass without a graph, so there the loss has a value only. Its gradient
  arrives at ``collect``, waits in the call, and is handed to the loss that the recomputation builds. The engine runs
  later nodes first, and ``collect`` comes after every layer, so it is there in time; if it is not, the recomputation
  says so.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe.errors import RecomputationError

_MAX_OPEN_CALLS = 256
"""Calls without a graph that are kept before the oldest is given up."""

_MAX_PENDING = 64
"""Losses that nobody collected before all are given up: each keeps its forward pass in memory."""

_MIN_AGREEMENT = 0.5
"""A recomputation that agrees with no open call on half of its assignments repeats none of them."""


@final
class Call:
    """One forward call: its decision, and the gradient that its loss is owed."""

    def __init__(
        self, chosen: Int[Tensor, "T K"], kept: Int[Tensor, "T K"], scores: Float[Tensor, "T E"], training: bool
    ) -> None:
        self.chosen = chosen
        """Expert ids as the router chose them."""
        self.kept = kept
        """Expert ids after capacity; the same tensor where nothing is dropped."""
        self.chosen_scores = _scores_of(chosen, scores)
        """``(T, K)``, what the router thought of them; tells calls apart that chose alike."""
        self.training = training
        self.collected = False
        self.loss_gradient: Tensor | None = None


@final
@dataclass(frozen=True)
class PendingLoss:
    """The balance loss of one call, not yet added to the training loss."""

    loss: Float[Tensor, ""]
    num_tokens: Int[Tensor, ""]
    call: Call
    previous: "PendingLoss | None"
    """The one before it. A chain and not a list, whose length a compiled layer would be compiled for."""


@final
class CallLog:
    """The calls of one layer that may still be recomputed, and their losses until ``collect``."""

    def __init__(self) -> None:
        self._with_graph: weakref.WeakSet[Call] = weakref.WeakSet()
        """Each is owned by its graph, and goes when the graph does."""
        self._without_graph: deque[Call] = deque(maxlen=_MAX_OPEN_CALLS)
        self._pending: PendingLoss | None = None

    def open_calls(self, training: bool = True) -> list[Call]:
        """The calls in training (or evaluation) mode that could be recomputed, in no order."""
        return [call for call in (*self._with_graph, *self._without_graph) if call.training == training]

    def find(self, chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"], training: bool) -> Call:
        """The open call that a recomputation repeats.

        Waits for the device only where several calls of this size are open, as under pipeline parallelism.

        Args:
            chosen: what the recomputation's router chooses.
            scores: what it thinks of all experts.
            training: the layer's mode.

        Raises:
            RecomputationError: no open call, or none that agrees.
        """
        calls = [call for call in self.open_calls(training) if call.chosen.shape == chosen.shape]
        if not calls:
            raise RecomputationError(
                f"a backward pass recomputes a call of {len(chosen)} tokens that this layer has no record of: "
                "moe.balance_step was called before backward(), or the layer was in another mode then, or under "
                "reentrant "
                f"checkpointing a graph is run backward twice or more than {_MAX_OPEN_CALLS} calls are waiting"
            )
        call = calls[0] if len(calls) == 1 else _best_match(calls, chosen, scores)
        if torch.is_grad_enabled() and call in self._without_graph:
            # From now on it lives as long as the graph that this recomputation builds: a region inside a region may be
            # recomputed once more. (Without gradients, this is such a region's own first pass.)
            self._without_graph.remove(call)
            self._with_graph.add(call)
        return call

    def open(self, call: Call, loss: Float[Tensor, ""] | None, num_tokens: Int[Tensor, ""]) -> None:
        """Note a new call, and its loss if it has one."""
        if torch.compiler.is_compiling():
            pass  # what is recomputed is the compiler's choice, and it would compile anew for each number of calls
        elif torch.is_grad_enabled():
            self._with_graph.add(call)
        else:
            self._without_graph.append(call)
        if loss is None:
            return
        if not torch.compiler.is_compiling() and len(self._take_pending(keep=True)) >= _MAX_PENDING:
            warnings.warn(
                f"{_MAX_PENDING} forward passes in training mode without moe.balance_loss(model): their balance "
                "losses are discarded and balance nothing. Add it to the training loss, or make MoE with balance=()",
                stacklevel=5,  # past torch, to the line that called the layer
            )
            self._pending = None
        self._pending = PendingLoss(loss, num_tokens, call, self._pending)

    def collect(self) -> Float[Tensor, ""] | None:
        """The mean loss of the calls since the last time, weighted by their tokens; None where there was none."""
        pending = self._take_pending()
        if not pending:
            return None
        weights = torch.stack([p.num_tokens for p in pending]).to(pending[0].loss.dtype)
        losses = torch.stack([_collect(p) for p in pending])
        return (losses * weights).sum() / weights.sum().clamp(min=1)

    def end_step(self) -> int:
        """Forget the calls without a graph, whose backward pass is over; returns how many losses nobody collected."""
        self._without_graph.clear()
        return len(self._take_pending())

    def _take_pending(self, *, keep: bool = False) -> list[PendingLoss]:
        """The losses that nobody collected, oldest first; forgotten here unless ``keep``."""
        pending, last = [], self._pending
        while last is not None:
            pending.append(last)
            last = last.previous
        if not keep:
            self._pending = None
        return pending[::-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallLog":
        """A copied layer has made no call yet."""
        return CallLog()

    def __reduce__(self) -> tuple[type["CallLog"], tuple[()]]:
        """An unpickled layer has made no call yet."""
        return CallLog, ()


def in_backward() -> bool:
    """Whether a backward pass is running, in which case a forward call is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def attach(y: Float[Tensor, "*batch D"], loss: Float[Tensor, ""] | None, call: Call) -> Float[Tensor, "*batch D"]:
    """``y``, made to keep ``call`` alive with its graph and, in a recomputation, to hand ``loss`` its gradient."""
    attached: Tensor = _Attach.apply(y, loss, call)
    return attached


def _best_match(calls: Sequence[Call], chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"]) -> Call:
    """The call that decided most alike, and of those the one whose scores are nearest; waits for the device."""
    agreement = torch.stack([(call.chosen == chosen).double().mean() for call in calls])
    distance = torch.stack([(_scores_of(call.chosen, scores) - call.chosen_scores).abs().mean() for call in calls])
    order = list(zip(agreement.tolist(), (-distance).tolist()))
    best = max(range(len(calls)), key=order.__getitem__)
    if order[best][0] < _MIN_AGREEMENT:
        raise RecomputationError(
            f"a backward pass recomputes one of {len(calls)} open calls of this layer, but its decisions agree with "
            f"none of them (best: {order[best][0]:.0%} of the assignments); use torch.utils.checkpoint with "
            "preserve_rng_state=True, or run backward after each forward"
        )
    return calls[best]


def _scores_of(chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"]) -> Float[Tensor, "T K"]:
    return scores.detach().gather(1, chosen.clamp(min=0).long())


def _collect(pending: PendingLoss) -> Float[Tensor, ""]:
    if pending.loss.requires_grad:
        return pending.loss
    pending.call.collected = True
    anchor = torch.zeros_like(pending.loss, requires_grad=True)
    collected: Tensor = _Collect.apply(anchor, pending.loss, pending.call)
    return collected


class _Collect(torch.autograd.Function):
    """The value of a loss that was computed without a graph; leaves its gradient in the call."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, call: Call) -> Tensor:
        ctx.call = call
        return anchor + loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.call.loss_gradient = gradient
        return gradient, None, None


class _Attach(torch.autograd.Function):
    """Identity on ``y``; gives ``loss`` the gradient that waits in the call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, _loss: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        ctx.recomputed = in_backward()
        ctx.mark_dirty(y)  # y itself and not a view of it, which nobody could change in place
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        call: Call = ctx.call
        if not (ctx.recomputed and call.collected):
            return gradient, None, None
        if call.loss_gradient is None:
            raise RecomputationError(
                "the balance loss of a layer under reentrant checkpointing has no gradient yet: call backward() once, "
                "on the sum of the training loss and moe.balance_loss(model), or checkpoint with use_reentrant=False"
            )
        return gradient, call.loss_gradient, None
