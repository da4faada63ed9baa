"""The layer's speed and memory, against other libraries, plain PyTorch and the floor.

    python benchmarks/layer.py
    python benchmarks/layer.py cases=[fine,many] dtype=float32 rounds=11
    python benchmarks/layer.py mode=memory
    python benchmarks/layer.py device=cuda

Times all contestants in turns in one process, on the same weights, tokens and routing problem, with the error against
float64 and the bytes kept for backward beside each time; or weighs forward and backward over the number of tokens.
Writes a table to benchmarks/results/. Settings and what they mean are in conf/layer.yaml, the contestants in peers/.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from measure import report
from measure.gpu import Roofline, measure_roofline, peak_bytes
from measure.machine import describe, hardware
from measure.oracle import Errors, compute_truth, judge
from measure.peak import Point, print_points, weigh, weigh_in_children
from measure.results import record, require_new
from measure.saved import saved_by
from measure.timing import Clock, EventClock, WallClock, race
from omegaconf import OmegaConf
from peers import FLOOR, FOREIGN, NAMES, build
from peers.contestant import Case, Contestant, Layer, Problem, UnavailableError, make_problem
from torch import Tensor

HERE = Path(__file__).resolve().parent
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NO_GPU = 2
"""Exit code: a GPU was asked for and there is none."""


@dataclass(frozen=True)
class Settings:
    """conf/layer.yaml with what the command line changed."""

    mode: str
    device: str
    dtype: torch.dtype
    cases: list[Case]
    names: list[str]
    rounds: int
    warmup: int
    limit: float
    seed: int
    results: Path
    memory_cases: list[Case]
    """Smallest first."""


def read_settings(arguments: Sequence[str]) -> Settings:
    """Compose the settings; ends the program with a line that says what is wrong."""
    try:
        with initialize_config_dir(str(HERE / "conf"), version_base=None):
            composed: Any = OmegaConf.to_container(compose("layer", overrides=list(arguments)), resolve=True)
    except HydraException as error:
        sys.exit(f"{error}")
    for key, allowed in (("mode", ("speed", "memory", "peak")), ("dtype", DTYPES)):
        require_among(key, [composed[key]], allowed)
    require_among("cases", composed["cases"], composed["shapes"])
    names = list(NAMES) if composed["contestants"] is None else composed["contestants"]
    require_among("contestants", names, NAMES)
    if composed["rounds"] < 1 or composed["warmup"] < 0:
        sys.exit(f"rounds={composed['rounds']} must be at least 1 and warmup={composed['warmup']} at least 0")
    if composed["threads"] is not None:
        torch.set_num_threads(composed["threads"])
    memory = composed["memory"]
    return Settings(
        composed["mode"],
        composed["device"],
        DTYPES[composed["dtype"]],
        [Case(name, **composed["shapes"][name]) for name in composed["cases"]],
        names,
        composed["rounds"],
        composed["warmup"],
        composed["limit"],
        composed["seed"],
        HERE / "results" if composed["results"] is None else Path(composed["results"]),
        [Case("memory", tokens, **memory["shape"]) for tokens in sorted(memory["tokens"])],
    )


def require_among(key: str, values: Sequence[str], allowed: Sequence[str] | dict[str, Any]) -> None:
    for value in values:
        if value not in allowed:
            sys.exit(f"{key}={value} is unknown; choose from {', '.join(allowed)}")


def speed(settings: Settings) -> Iterator[str]:
    """Race the contestants through every case; yields Markdown."""
    on_gpu = settings.device.startswith("cuda")
    clock: Clock = EventClock(settings.device) if on_gpu else WallClock()
    roofline = measure_roofline(clock, settings.dtype, settings.device) if on_gpu else None
    if roofline is not None:
        yield f"Measured limits: {roofline.flops / 1e12:.4g} TFLOP/s in a product, {roofline.bandwidth / 1e9:.4g} GB/s."
        yield ""
    names = [FLOOR, *(name for name in settings.names if name != FLOOR)]
    for case in settings.cases:
        yield from speed_of_case(settings, case, names, clock, roofline)
        yield ""


def speed_of_case(
    settings: Settings, case: Case, names: Sequence[str], clock: Clock, roofline: Roofline | None
) -> Iterator[str]:
    """One case, in Markdown."""
    entry = examine(settings, make_problem(case, settings.dtype, settings.device, settings.seed), names)
    contestants = entry.contestants
    progress(f"{case.name}: {len(contestants)} contestants in {settings.warmup} + {settings.rounds} rounds")
    times = race(contestants, clock, settings.rounds, settings.warmup)
    yield from report.case_table(case, entry.load, times, entry.saved, entry.errors, entry.skipped)
    if roofline is not None:
        peaks = {name: peak_bytes(contestant, settings.device) for name, contestant in contestants.items()}
        yield from report.gpu_table(case, times, peaks, roofline, settings.dtype)


@dataclass(frozen=True)
class Entry:
    """Who takes part in a case, and what is known before the race."""

    contestants: dict[str, Contestant]
    skipped: dict[str, str]
    errors: dict[str, Errors | None]
    saved: dict[str, int | None]
    load: Tensor
    """``(E,)``, tokens per expert."""


def examine(settings: Settings, problem: Problem, names: Sequence[str]) -> Entry:
    """Make the contestants, take a step with each and compare it with float64, whose tensors go when this returns."""
    progress(f"{problem.case.name}: float64")
    truth = compute_truth(problem)
    errors: dict[str, Errors | None] = {}
    saved: dict[str, int | None] = {}
    seconds: dict[str, float] = {}

    def tried(name: str, contestant: Contestant) -> None:
        progress(f"{problem.case.name}: {name}")
        contestant.ready(training=True)
        start = time.perf_counter()
        y = contestant.step()
        y[0, 0].item()  # a GPU is waited for
        seconds[name] = time.perf_counter() - start
        over_floor = seconds[name] / seconds[FLOOR]
        if name in FOREIGN and over_floor > settings.limit:
            raise UnavailableError(
                f"its first step took {over_floor:.0f} times the floor's, over limit={settings.limit}"
            )
        errors[name] = judge(contestant, y, truth) if isinstance(contestant, Layer) else None
        saved[name] = saved_by(contestant) if isinstance(contestant, Layer) else None

    contestants, skipped = build(problem, names, tried)
    return Entry(contestants, skipped, errors, saved, truth.tokens_per_expert)


def progress(line: str) -> None:
    """Say what goes on, since a case takes minutes; apart from the result, which is on the other stream."""
    print(line, file=sys.stderr, flush=True)


def memory(settings: Settings, arguments: Sequence[str], plot: Path) -> Iterator[str]:
    """Weigh the contestants over the number of tokens; yields Markdown and draws the plot."""
    names = [name for name in settings.names if name != "bare"]  # which has no autograd, and keeps what it is given
    sizes = [case.tokens for case in settings.memory_cases]
    points: list[Point] = []
    if settings.device == "cpu":
        points += weigh_in_children(Path(__file__), names, arguments)
    else:
        for name in names:
            points += weigh(name, settings.memory_cases, settings.dtype, settings.device, settings.seed)
    weighed = "resident memory of a process each" if settings.device == "cpu" else "PyTorch's allocator"
    yield f"Peak of forward and backward, the gradients of all weights included, in MB, by {weighed}."
    yield f"The largest of the cases is {settings.memory_cases[-1]}; the others have fewer tokens."
    yield ""
    yield from report.memory_table(points, names, sizes)
    yield ""
    yield f"![peak memory over tokens]({plot.name})"
    report.memory_plot(points, names, plot)


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say, overrides of conf/layer.yaml; returns the exit code."""
    settings = read_settings(arguments)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"device={settings.device}: PyTorch {torch.__version__} sees no GPU here; nothing was measured",
            file=sys.stderr,
        )
        return NO_GPU
    if settings.mode == "peak":
        print_points(weigh(settings.names[0], settings.memory_cases, settings.dtype, settings.device, settings.seed))
        return 0
    kind = "layer_memory" if settings.mode == "memory" else "layer"
    dtype = str(settings.dtype).removeprefix("torch.")
    stem = settings.results / f"{kind}_{dtype}_{hardware(settings.device)}_{date.today()}"
    path, plot = stem.with_suffix(".md"), stem.with_suffix(".svg")
    require_new(path)
    title = "Peak memory of the layer" if settings.mode == "memory" else "The layer's speed"
    command = " ".join(["python benchmarks/layer.py", *arguments])
    head = [f"# {title}, {dtype}", "", f"`{command}`", *describe(settings.device), ""]
    record(path, head, memory(settings, arguments, plot) if settings.mode == "memory" else speed(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
