"""How evenly experts are used, and what that costs: every router with every balance, on the same text.

    python benchmarks/utilization.py -m router=softmax,sigmoid balance=none,switch,score_bias seed=0,1,2
    python benchmarks/utilization.py mode=sweep pairs=all seeds=[0,1,2] jobs=2
    python benchmarks/utilization.py mode=timing
    python benchmarks/utilization.py mode=report
    python benchmarks/utilization.py mode=pictures

The first two train a small language model for each router, balance and seed, and leave a result each below
runs/utilization; what is there is not trained again. The third times steps of all pairs in turns. The fourth makes a
page with plots in benchmarks/results of all that is there, and the last draws the pictures of the documentation anew.
Settings and what they mean are in conf/utilization.yaml.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from sweep.children import run_all
from sweep.job import Job, read_job
from sweep.pictures import write_pictures
from sweep.race import time_steps
from sweep.report import write_report
from sweep.result import read_result
from sweep.train import train

HERE = Path(__file__).resolve().parent
MODES = ("run", "sweep", "timing", "report", "pictures")
_OWN = (
    "mode",
    "pairs",
    "pairs.list",
    "seeds",
    "jobs",
    "router",
    "balance",
    "seed",
    "timing.rounds",
    "timing.warmup",
    "results",
)
"""Arguments that are not for a single training, or that it is given anew."""


@hydra.main(version_base=None, config_path=str(HERE / "conf"), config_name="utilization")
def main(config: DictConfig) -> None:
    """Do what ``mode`` says."""
    arguments = list(HydraConfig.get().overrides.task)
    settings: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, ["mode", "pairs", "seeds", "jobs", "timing"]))
    check(settings)
    mode = settings["mode"]
    if mode == "run":
        train_one(arguments)
        return
    plan = plan_of(settings, arguments)
    if mode == "sweep":
        sweep(plan, settings["jobs"])
    elif mode == "timing":
        jobs = [job for job, _ in plan if job.seed == settings["seeds"][0]]
        time_steps(jobs, settings["timing"]["rounds"], settings["timing"]["warmup"])
    elif mode == "pictures":
        write_pictures(plan[0][0], Path(config.results or HERE.parent / "docs" / "_static" / "sweep"))
    else:
        command = " ".join(["python benchmarks/utilization.py", *arguments])
        write_report([job for job, _ in plan], Path(config.results or HERE / "results"), command)


def check(settings: Any) -> None:
    """End the program where a setting of our own cannot be."""
    mode, pairs, seeds = settings["mode"], settings["pairs"]["list"], settings["seeds"]
    if mode not in MODES:
        sys.exit(f"mode={mode} is unknown; choose from {', '.join(MODES)}")
    if mode != "run" and "RANK" in os.environ:
        sys.exit(f"mode={mode} is for one process; under torchrun give -m, and routers, balances and seeds by name")
    if not (isinstance(pairs, list) and pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        sys.exit(f"pairs.list={pairs} must be a list of a router and a balance each: [[softmax,none],[sigmoid,switch]]")
    if not (isinstance(seeds, list) and seeds):
        sys.exit(f"seeds={seeds} must be a list of whole numbers")
    counts = {"jobs": settings["jobs"]} | {f"timing.{name}": value for name, value in settings["timing"].items()}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            sys.exit(f"{name}={value} must be a whole number of at least 1")


def train_one(arguments: Sequence[str]) -> None:
    """One training, unless it has been done."""
    job = read_job(arguments)
    started = time.monotonic()
    was_trained = train(job)
    say(f"{job}: {f'{time.monotonic() - started:.0f} s' if was_trained else 'was done'}")


def sweep(plan: Sequence[tuple[Job, list[str]]], at_once: int) -> None:
    """All trainings of a plan that have not been done, each in a process of its own; exit status 1 if some failed."""
    waiting = {job.folder.name: (job, own) for job, own in plan if read_result(job.result, job.fingerprint) is None}
    say(f"{len(plan)} trainings, of which {len(plan) - len(waiting)} were done")
    first, _ = plan[0]
    logs = first.root / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    commands = {name: [sys.executable, __file__, *own] for name, (_, own) in waiting.items()}
    threads = first.settings["run"]["threads"]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    started, failed = time.monotonic(), []
    with closing(run_all(commands, at_once, environment, logs)) as ended:
        for number, (name, status) in enumerate(ended, start=1):
            failed += [name] if status else []
            word = f"FAILED with {status}, see {logs / f'{name}.log'}" if status else "done"
            say(f"{number}/{len(waiting)}, {time.monotonic() - started:.0f} s: {waiting[name][0]}: {word}")
    if failed:
        sys.exit(f"{len(failed)} of {len(waiting)} trainings failed: {', '.join(failed)}")


def plan_of(settings: Any, arguments: Sequence[str]) -> list[tuple[Job, list[str]]]:
    """Trainings, each with its command line: seed by seed, so that after an early end all pairs have as many."""
    shared = shared_arguments(arguments)
    own = [
        [*shared, f"router={router}", f"balance={balance}", f"seed={seed}"]
        for seed in settings["seeds"]
        for router, balance in settings["pairs"]["list"]
    ]
    return [(read_job(line), line) for line in own]


def shared_arguments(arguments: Sequence[str]) -> list[str]:
    """Those that go to each training."""
    return [text for text in arguments if text.lstrip("+~").partition("=")[0] not in _OWN]


def say(line: str) -> None:
    """Apart from results, which are on the other stream."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where this one stopped")
        sys.exit(130)
