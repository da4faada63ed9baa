"""Peak memory of forward and backward over the number of tokens.

On a GPU the allocator counts. On the CPU nothing in Python sees all: hooks on autograd see what is saved but not the
buffers of a moment, a dispatch mode sees neither ``out=`` buffers inside a custom op nor the scratch of oneDNN, and the
profiler sees what PyTorch's allocator gives out but not what a library allocates for itself. The kernel sees every page
that is touched, whoever asked for it. So each contestant runs in a process of its own, whose high-water mark of
resident memory (VmHWM) is set back before each step. Two things make resident memory follow the tensors: malloc is told
to take every block above 64 KiB from the kernel and to give it back at once, and large pages are switched off, with
which a buffer of 100 KiB would count as 2 MiB. What autograd says it saved stands beside it as a check.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import final

import torch
from peers import build
from peers.contestant import Case, Contestant, Layer, make_problem

from measure.gpu import peak_bytes
from measure.saved import saved_by

CHILD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
"""Environment of a process whose memory is weighed: glibc gives large blocks back when they are freed."""

_PR_SET_THP_DISABLE = 41
_PAGES, _STATUS, _CLEAR_REFS = Path("/proc/self/statm"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


@final
@dataclass(frozen=True)
class Point:
    """One contestant at one number of tokens; bytes."""

    name: str
    tokens: int
    peak: int = 0
    """Above what was there before the step; the gradients of all weights are in it."""
    held: int | None = None
    """Still there between forward and backward, without the output; None where only PyTorch's allocator was asked."""
    saved: int = 0
    """What autograd says it keeps."""
    skipped: str = ""
    """Why there is no figure."""


def weigh(name: str, cases: Sequence[Case], dtype: torch.dtype, device: str, seed: int) -> Iterator[Point]:
    """One contestant at each size, smallest first, in this process.

    Raises:
        OSError: no Linux, whose /proc is needed on the CPU.
    """
    if device == "cpu":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    for case in cases:
        problem = make_problem(case, dtype, device, seed)
        found, skipped = build(problem, [name], take_a_step)
        if skipped:
            yield Point(name, case.tokens, skipped=skipped[name])
            continue
        layer = found.pop(name)
        assert isinstance(layer, Layer), f"{name} has no autograd to weigh"
        saved = saved_by(layer)
        if device == "cpu":
            held, peak = _resident(layer)
        else:
            held, peak = None, peak_bytes(layer, device)
        yield Point(name, case.tokens, peak, held, saved)


def take_a_step(_name: str, contestant: Contestant) -> None:
    """What is made once, compiled code and caches of primitives, is made here."""
    contestant.ready(training=True)
    contestant.step()


def _resident(layer: Layer) -> tuple[int, int]:
    """What the process holds between forward and backward, and at most."""
    layer.ready(training=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # the high-water mark becomes what is resident now
    before = _resident_bytes()
    y = layer.run(layer.x)
    held = _resident_bytes() - before - y.nbytes
    y.backward(layer.output_grad)
    return held, _high_water_bytes() - before


def _resident_bytes() -> int:
    return int(_PAGES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _high_water_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def weigh_in_children(script: Path, names: Sequence[str], arguments: Sequence[str]) -> Iterator[Point]:
    """Start the script once for each contestant, and read the points that it prints, a line of JSON each.

    Raises:
        RuntimeError: a child ended with an error.
    """
    for name in names:
        command = [sys.executable, str(script), *arguments, "mode=peak", f"contestants=[{name}]"]
        done = subprocess.run(command, env={**os.environ, **CHILD}, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"weighing {name} ended with {done.returncode}:\n{done.stderr}")
        yield from (Point(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{"))


def print_points(points: Iterator[Point]) -> None:
    """What ``weigh_in_children`` reads."""
    for point in points:
        print(json.dumps(asdict(point)), flush=True)


def slope(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Bytes per token: the line of least squares through the points."""
    middle, level = mean(tokens), mean(values)
    return sum((t - middle) * (v - level) for t, v in zip(tokens, values)) / sum((t - middle) ** 2 for t in tokens)
