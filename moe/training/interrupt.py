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
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
