"""Checkpoints that know which call each recomputation repeats.

Non-reentrant checkpointing asks a function for two contexts: one around the forward pass of a region and one around its
recomputation. A pair of them shares a tape: calls are written to it in the forward pass and read back in the same
order, layer by layer, in the recomputation.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import final

import torch

from moe.balance.calls import Call, CallLog
from moe.errors import RecomputationError

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


@final
class Tape:
    """The calls of one checkpointed region, by layer and in order."""

    def __init__(self) -> None:
        self._calls: dict[CallLog, list[Call]] = {}
        self._read: dict[CallLog, int] = {}
        self.is_read = False

    def write(self, log: CallLog, call: Call) -> None:
        """Note a call of a layer."""
        self._calls.setdefault(log, []).append(call)

    def rewind(self) -> None:
        """Read from the beginning again."""
        self._read.clear()

    def read(self, log: CallLog) -> Call:
        """The next call of a layer.

        Raises:
            RecomputationError: the layer was not called as often in the forward pass.
        """
        calls, place = self._calls.get(log, []), self._read.get(log, 0)
        if place >= len(calls):
            raise RecomputationError(
                f"a recomputation calls a layer {place + 1} times, where the checkpointed forward pass called it "
                f"{len(calls)} times; a checkpointed function must do the same both times"
            )
        self._read[log] = place + 1
        return calls[place]


_TAPES: ContextVar[tuple[Tape, ...]] = ContextVar("moe_tapes", default=())
"""Of the regions that are running in this thread, outermost first."""


def write_call(log: CallLog, call: Call) -> None:
    """Note a call, new or repeated, on the tapes that are being written."""
    if not torch.compiler.is_compiling():
        for tape in _TAPES.get():
            if not tape.is_read:
                tape.write(log, call)


def read_call(log: CallLog) -> Call | None:
    """The call that a recomputation repeats, from the innermost tape that is being read; None without one."""
    for tape in reversed(_TAPES.get()):
        if tape.is_read:
            return tape.read(log)
    return None


def checkpoint_contexts(inner: Callable[[], Contexts] | None = None) -> Contexts:
    """What ``torch.utils.checkpoint(..., use_reentrant=False, context_fn=moe.checkpoint_contexts)`` asks for.

    Every recomputation then repeats the decisions of its own forward pass, whatever it would decide itself and however
    many calls of a layer are open. Without it the layer finds the call by how alike its decisions are, and refuses
    where that is doubtful. In transformers it passes through
    ``model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn":
    moe.checkpoint_contexts})``.

    Args:
        inner: another ``context_fn`` to be entered inside these, such as that of selective checkpointing;
            ``context_fn=functools.partial(moe.checkpoint_contexts, inner)``.

    Returns:
        The context of the forward pass and that of the recomputation.
    """
    tape = Tape()
    forward, recomputation = inner() if inner is not None else (nullcontext(), nullcontext())
    return _Running(tape, forward, is_read=False), _Running(tape, recomputation, is_read=True)


@final
class _Running:
    """A tape in use around a region; entered anew each time that the region is computed again."""

    def __init__(self, tape: Tape, inner: AbstractContextManager[object], *, is_read: bool) -> None:
        self._tape, self._inner, self._is_read = tape, inner, is_read
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._tape.is_read = self._is_read
        self._tape.rewind()
        token = _TAPES.set((*_TAPES.get(), self._tape))
        self._stack.callback(_TAPES.reset, token)
        self._stack.enter_context(self._inner)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, traceback)
