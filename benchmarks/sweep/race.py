"""Steps of all pairs in turns in one process: the time of one beside that of another in the same minute."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from measure.timing import Spread, WallClock, over
from torch import nn

from moe.layer import balance_step
from moe.training.atomic import replace_text
from moe.training.config import pick_device
from moe.training.data import PreparedData, WindowLoader, prepare
from moe.training.launch import make_model
from moe.training.optim import make_optimizer
from moe.training.runner import forward_backward
from sweep.job import Job
from sweep.train import machine


@final
@dataclass(frozen=True)
class Times:
    """Seconds a step by round."""

    sweep: str
    """The fingerprint of the settings, see `sweep.job.Job`."""
    rounds: int
    warmup: int
    seconds: Mapping[str, Sequence[float]]
    """By name of the pair; the first is what the others are compared with."""
    machine: str

    def ratios(self) -> dict[str, Spread]:
        """Over the first pair's step of the same round."""
        first = next(iter(self.seconds.values()))
        return {name: over(list(mine), list(first)) for name, mine in self.seconds.items()}


@final
class Stepper:
    """Takes training steps of a job, without metrics and checkpoints, at the highest learning rate."""

    def __init__(self, job: Job, data: PreparedData) -> None:
        run, optim = job.settings["run"], job.settings["optim"]
        torch.manual_seed(job.seed)
        model = make_model(job.settings, data.tokenizer.vocab_size, run["seq_len"])
        self.model = model.to(pick_device(run["device"])).train()
        self.optimizer = make_optimizer(self.model, peak=optim["peak"], **optim["adamw"])
        self.loader = WindowLoader(data.train, run["seq_len"], run["batch_size"], job.seed, data.fingerprint)
        self.clip_norm: float = run["clip_norm"]

    def step(self) -> None:
        """One optimizer step of one micro-batch; waits for the device."""
        forward_backward(self.model, self.loader.next_batch(), 1.0, nullcontext())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        balance_step(self.model)


def time_steps(jobs: Sequence[Job], rounds: int, warmup: int) -> Times:
    """Time steps of several jobs in turns, and keep the times beside the results of the sweep.

    Who begins moves on by one from round to round.

    Args:
        jobs: of one sweep.
        rounds: one step each.
        warmup: rounds before them that do not count; routers that start dense need some to become sparse.
    """
    settings: Any = jobs[0].settings
    if settings["run"]["threads"] is not None:
        torch.set_num_threads(settings["run"]["threads"])
    data = prepare(**settings["data"], **settings["tokenizer"])
    steppers = {f"{job.router} / {job.balance}": Stepper(job, data) for job in jobs}
    names, clock = list(steppers), WallClock()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = clock.seconds(steppers[name].step)
            if number >= 0:
                seconds[name].append(taken)
    times = Times(jobs[0].sweep, rounds, warmup, seconds, machine(pick_device(settings["run"]["device"])))
    path = times_file(jobs[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(times)))
    return times


def times_file(job: Job) -> Path:
    """Where the times of a job's sweep lie."""
    return job.root / f"timing-{job.sweep}.json"


def read_times(job: Job) -> Times | None:
    """The times of a job's sweep, if they were measured."""
    try:
        return Times(**json.loads(times_file(job).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
