"""The forward calls of one layer, so that each is decided once, counted once and penalised once.

Activation checkpointing runs a layer's forward twice: once in the forward pass, and again inside the backward pass. The
second run must replay the first one's decision, whatever it would decide itself, and must count nothing. It is
recognised by running inside a backward pass. Which call it repeats is known where the checkpoint was made with
`moe.checkpoint_contexts` (see `moe.balance.tape`), clear where only one is open, and otherwise the open call whose
decision agrees best; where that is doubtful, the recomputation says so.

The balance losses of a call are a vector of parts (see `moe.balance.balancer`), which reach the router in one of two
ways:

* Where the forward pass builds a graph (no checkpointing, or the non-reentrant kind), the parts are simply in it.
* Reentrant checkpointing runs the forward pass without a graph, so there the parts have values only. Their gradient
  arrives after `take`, waits in the call, and is handed to the parts that the recomputation builds. The engine runs
  later nodes first, and `take` comes after every layer, so it is there in time; if it is not, the recomputation
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

from moe.balance.attach import Owed, collectable
from moe.errors import RecomputationError

_MAX_OPEN_CALLS = 256
"""Calls without a graph that are kept before the oldest is given up."""

_MAX_PENDING = 64
"""Losses that nobody collected before all are given up: each keeps its forward pass in memory."""

_MIN_AGREEMENT = 0.5
"""A recomputation that agrees with no open call on half of its assignments repeats none of them."""


@final
class Call:
    """One forward call: its decision, and the gradient that its losses are owed."""

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
        self.owed = Owed()


@final
@dataclass(frozen=True)
class PendingLoss:
    """The parts of the balance losses of one call, not yet added to the training loss."""

    parts: Float[Tensor, " P"]
    num_tokens: Int[Tensor, ""]
    tokens_per_expert: Int[Tensor, " E"] | None
    """Where a loss is over more than one call."""
    owed: Owed
    previous: "PendingLoss | None"
    """The one before it. A chain and not a list, whose length a compiled layer would be compiled for."""


@final
class CallLog:
    """The calls of one layer that may still be recomputed, and their losses until ``take``."""

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
        self.keep(call)
        return call

    def keep(self, call: Call) -> None:
        """Note that a recomputation has found its call, which from now on lives as long as the graph that it builds.

        A region inside a region may be recomputed once more. (Without gradients, this is such a region's own first
        pass.)
        """
        if torch.is_grad_enabled() and call in self._without_graph:
            self._without_graph.remove(call)
            self._with_graph.add(call)

    def open(
        self,
        call: Call,
        parts: Float[Tensor, " P"] | None,
        num_tokens: Int[Tensor, ""],
        tokens_per_expert: Int[Tensor, " E"] | None,
    ) -> None:
        """Note a new call, and what its losses are made of if it has any."""
        if torch.compiler.is_compiling():
            pass  # what is recomputed is the compiler's choice, and it would compile anew for each number of calls
        elif torch.is_grad_enabled():
            self._with_graph.add(call)
        else:
            self._without_graph.append(call)
        if parts is None:
            return
        if not torch.compiler.is_compiling() and len(self._take_pending(keep=True)) >= _MAX_PENDING:
            warnings.warn(
                f"{_MAX_PENDING} forward passes in training mode without moe.balance_loss(model): their balance "
                "losses are discarded and balance nothing. Add it to the training loss, or make MoE with balance=()",
                stacklevel=5,  # past torch, to the line that called the layer
            )
            self._pending = None
        self._pending = PendingLoss(parts, num_tokens, tokens_per_expert, call.owed, self._pending)

    def take(self) -> list[tuple[Float[Tensor, " P"], PendingLoss]]:
        """The calls since the last time, oldest first: parts that carry gradients, and what they were made of."""
        return [(collectable(pending.parts, pending.owed), pending) for pending in self._take_pending()]

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


def _best_match(calls: Sequence[Call], chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"]) -> Call:
    """The call that decided most alike, and of those the one whose scores are nearest; waits for the device."""
    agreement = torch.stack([(call.chosen == chosen).double().mean() for call in calls])
    distance = torch.stack([(_scores_of(call.chosen, scores) - call.chosen_scores).abs().mean() for call in calls])
    found = list(zip(agreement.tolist(), distance.tolist()))
    # The very scores of a call tell more than its decision, which may have been a repeated one.
    # Of equal calls, one whose losses were collected is the one that a backward pass is under way for.
    order = sorted(
        range(len(calls)),
        key=lambda place: (
            found[place][1] != 0,
            -found[place][0],
            found[place][1],
            calls[place].owed.gradient is None,
        ),
    )
    best = order[0]
    agrees, away = found[best]
    if away == 0 and found[order[1]][1] != 0:
        return calls[best]
    advice = (
        "use torch.utils.checkpoint with use_reentrant=False and context_fn=moe.checkpoint_contexts, "
        "or run backward after each forward"
    )
    if agrees < _MIN_AGREEMENT:
        raise RecomputationError(
            f"a backward pass recomputes one of {len(calls)} open calls of this layer, but its decisions agree with "
            f"none of them (best: {agrees:.0%} of the assignments); keep preserve_rng_state=True, or {advice}"
        )
    for place in order[1:]:
        also_agrees, also_away = found[place]
        if agrees - also_agrees > 1 - agrees or also_away > 2 * away:
            continue
        if not torch.equal(calls[place].chosen, calls[best].chosen):
            raise RecomputationError(
                f"a backward pass recomputes one of {len(calls)} open calls of this layer, and two that decided "
                f"otherwise are as near ({agrees:.1%} and {also_agrees:.1%} of the assignments agree): {advice}"
            )
    return calls[best]


def _scores_of(chosen: Int[Tensor, "T K"], scores: Float[Tensor, "T E"]) -> Float[Tensor, "T K"]:
    return scores.detach().gather(1, chosen.clamp(min=0).long())
