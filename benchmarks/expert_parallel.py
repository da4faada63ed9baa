"""Expert parallelism against the plain one: bytes per token, time per layer, and what overlaps.

    python benchmarks/expert_parallel.py
    python benchmarks/expert_parallel.py cases=[few] processes=[2] rounds=15

One layer whose experts are divided among the processes of this machine (gloo, one thread each), once as the library
sends tokens, each once to every rank that holds one of its experts, and once as the common stacks do, one copy for each
expert. All take turns in the same processes, on the same tokens and weights. Writes tables to benchmarks/results/.
Settings and what they mean are in conf/expert_parallel.yaml, the plain one is parallel/plain.py.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from measure.machine import describe, hardware
from measure.results import record, require_new
from omegaconf import OmegaConf
from parallel.tables import case_tables
from parallel.trial import Plan, measure
from peers.contestant import Case

from moe.parallel.local_ranks import run_local

HERE = Path(__file__).resolve().parent
AT_LEAST = {"rounds": 1, "warmup": 0, "profiled": 1, "timeout": 1, "chunks": 1, "processes": 2}


@dataclass(frozen=True)
class Settings:
    """conf/expert_parallel.yaml with what the command line changed."""

    plan: Plan
    cases: list[Case]
    processes: list[int]
    timeout: float
    results: Path


def read_settings(arguments: Sequence[str]) -> Settings:
    """Compose the settings; ends the program with a line that says what is wrong."""
    try:
        with initialize_config_dir(str(HERE / "conf"), version_base=None):
            composed: Any = OmegaConf.to_container(compose("expert_parallel", overrides=list(arguments)), resolve=True)
    except HydraException as error:
        sys.exit(f"{error}")
    for name in composed["cases"]:
        if name not in composed["shapes"]:
            sys.exit(f"cases={name} is unknown; choose from {', '.join(composed['shapes'])}")
    for key, least in AT_LEAST.items():
        values = composed[key] if isinstance(composed[key], list) else [composed[key]]
        if not values or not all(isinstance(value, int) and value >= least for value in values):
            sys.exit(f"{key}={composed[key]} must be whole numbers of at least {least}")
    cases = [Case(name, **composed["shapes"][name]) for name in composed["cases"]]
    for case in cases:
        if case.num_experts < max(composed["processes"]):
            sys.exit(f"processes={composed['processes']} is more than num_experts={case.num_experts} of {case.name}")
    plan = Plan(*(composed[key] for key in ("chunks", "rounds", "warmup", "profiled", "seed")))
    results = HERE / "results" if composed["results"] is None else Path(composed["results"])
    return Settings(plan, cases, composed["processes"], composed["timeout"], results)


def tables(settings: Settings) -> Iterator[str]:
    """Every number of processes through every case; yields Markdown."""
    for size in settings.processes:
        for case in settings.cases:
            print(f"{case.name}: {size} processes", file=sys.stderr, flush=True)
            yield from case_tables(case, run_local(measure, size, (settings.plan, case), timeout=settings.timeout))
            yield ""


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say, overrides of conf/expert_parallel.yaml; returns the exit code."""
    settings = read_settings(arguments)
    ranks = "-".join(map(str, settings.processes))
    path = settings.results / f"expert_parallel_float32_{ranks}ranks_{hardware('cpu')}_{date.today()}.md"
    require_new(path)
    command = " ".join(["python benchmarks/expert_parallel.py", *arguments])
    head = ["# Expert parallelism, float32", "", f"`{command}`", *describe("cpu")]
    head += [
        f"The measured processes have one thread each and talk over gloo; {settings.plan.rounds} rounds in turns, "
        "the time of a round is that of its slowest rank.",
        "",
    ]
    record(path, head, tables(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
