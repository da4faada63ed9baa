"""A wish to stop, noted now and granted at the end of the step."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, final

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM, which batch systems send) into a flag; the second one interrupts at once.

    Example::

        with StopRequest() as stop:
            while not stop.requested:
                step()

    Outside the main thread, where Python lets nobody handle signals, it does nothing.

    Args:
        insistent: whether a second signal interrupts at once, and any signal after the end, by an error too. Not under
            a launcher: it passes on what a terminal or a batch system has already sent to all, ends the other
            processes by SIGTERM when one is lost, while these are about to say which, and kills who takes too long.
    """

    def __init__(self, *, insistent: bool = True) -> None:
        self.requested = False
        self._insistent = insistent
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._insistent or kind is None:
            self._restore()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._insistent:
            print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
