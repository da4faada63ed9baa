"""The live display of a training run."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe.training.metrics import worst_max_vio

_MEASURES = {
    "train/loss": "loss {:.3f}",
    "val/bits_per_byte": "val {:.3f} bits/byte",
    "train/tokens_per_second": "{:,.0f} tokens/s",
}


class Progress:
    """Shows how far a run is and how it does: a live bar on a terminal, plain lines elsewhere (CI logs, files).

    Example::

        with Progress(total_steps=600) as progress:
            for step in range(1, 601):
                ...
                progress.update(step, line)     # the keys of metrics.jsonl
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        plain_every: int = 20,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set the display up; it appears on ``with``.

        Args:
            total_steps: the step the run ends at.
            start_step: the step it starts from, not 0 when it is resumed; the time left is reckoned from there.
            plain_every: where there is no terminal, one line is printed every so many updates, and one at the end.
            console: where to show it; None is standard output.
            clock: seconds from any origin.
        """
        self._total = total_steps
        self._start_step = self._step = start_step
        self._plain_every = plain_every
        self._console = console or Console()
        self._clock = clock
        self._started = clock()
        self._latest: dict[str, object] = {}
        self._updates = 0
        self._live: Live | None = None

    def update(self, step: int, values: Mapping[str, object] | None = None) -> None:
        """Take a step into the display.

        Args:
            step: optimizer steps done.
            values: keys of ``metrics.jsonl`` measured at this step, if any; the latest of each is shown.
        """
        self._step = step
        self._latest = {**self._latest, **(values or {})}  # a new one: the display's thread may be reading the old
        self._updates += 1
        if self._live is None and (self._updates % self._plain_every == 0 or step >= self._total):
            line = " · ".join([f"step {self._step}/{self._total}", *self._measures(), self._times()])
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._started = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()  # draws the last state once more
            self._live = None

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(
            Text(f"step {self._step}/{self._total}", style="bold"),
            ProgressBar(total=self._total, completed=self._step),
            Text(self._times(), style="dim"),
        )
        return Group(row, Text(" · ".join(self._measures()) or "waiting for the first measurement", style="cyan"))

    def _measures(self) -> list[str]:
        """The measured values as words, without those not measured yet."""
        parts = []
        for key, words in _MEASURES.items():
            value = self._latest.get(key)
            if isinstance(value, int | float):
                parts.append(words.format(value))
        worst = worst_max_vio(self._latest)
        if worst is not None:
            parts.append(f"MaxVio {worst[1]:.3f} ({worst[0]})")
        return parts

    def _times(self) -> str:
        elapsed = self._clock() - self._started
        done = self._step - self._start_step
        left = format_clock(elapsed / done * (self._total - self._step)) if done > 0 else "-:--"
        return f"{format_clock(elapsed)} elapsed, {left} left"


def format_clock(seconds: float) -> str:
    """Write a duration the way a stopwatch does.

    Args:
        seconds: the duration.

    Returns:
        ``m:ss``, or ``h:mm:ss`` from an hour on.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
