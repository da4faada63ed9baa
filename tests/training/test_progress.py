import io
import math

import pytest
from rich.console import Console

from moe.training.progress import Progress, format_clock

MEASURED = {
    "train/loss": 1.23456,
    "val/bits_per_byte": 2.5,
    "balance/max_vio/blocks.1.ffn": 0.125,
    "balance/max_vio/blocks.3.ffn": 0.375,
    "train/tokens_per_second": 20500.4,
}
SHOWN = "loss 1.235 · val 2.500 bits/byte · 20,500 tokens/s · MaxVio 0.375 (blocks.3.ffn)"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_every_so_many_updates_and_at_the_end() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(10, plain_every=4, console=Console(file=out, width=40), clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 3
            progress.update(step, MEASURED if step == 3 else None)
    # 40 columns are less than a line has: it must not be broken, so that logs can be searched.
    assert out.getvalue().splitlines() == [
        f"step 4/10 · {SHOWN} · 0:12 elapsed, 0:18 left",
        f"step 8/10 · {SHOWN} · 0:24 elapsed, 0:06 left",
        f"step 10/10 · {SHOWN} · 0:30 elapsed, 0:00 left",
    ]


def test_time_left_counts_from_where_the_run_was_resumed() -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(100, start_step=90, plain_every=1, console=Console(file=out), clock=clock) as progress:
        progress.update(90)
        clock.now += 10
        progress.update(92)
    assert out.getvalue().splitlines() == [
        "step 90/100 · 0:00 elapsed, -:-- left",
        "step 92/100 · 0:10 elapsed, 0:40 left",
    ]


def test_what_was_not_measured_is_left_out_and_what_is_not_finite_shows() -> None:
    out = io.StringIO()
    with Progress(3, plain_every=1, console=Console(file=out), clock=Clock()) as progress:
        progress.update(1, {"train/loss": math.nan})
    assert out.getvalue() == "step 1/3 · loss nan · 0:00 elapsed, 0:00 left\n"


def test_live_display_on_a_terminal() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with Progress(10, plain_every=1, console=console, clock=clock) as progress:
        clock.now += 75
        progress.update(5, MEASURED)
    text = out.getvalue()
    assert "step 5/10" in text
    assert "1:15 elapsed, 1:15 left" in text
    assert SHOWN in text
    assert "━" in text  # the bar
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and given back


def test_the_terminal_is_given_back_after_an_error() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with pytest.raises(KeyboardInterrupt), Progress(10, console=console, clock=Clock()):
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (36061, "10:01:01")]
)
def test_clock_format(seconds: float, text: str) -> None:
    assert format_clock(float(seconds)) == text
