"""Trains one job, unless its result is there."""

import os
import platform
import shutil
import time
import traceback
from collections.abc import Mapping
from typing import final

import torch
from measure.machine import cpu_fact, installed

from moe.balance import BIAS_RULES
from moe.monitor import LoadStats
from moe.training.launch import Run, launch
from moe.training.trainer import Status
from sweep.job import Job
from sweep.result import FORMAT, Result, read_result, write_result


@final
class StepLog:
    """Keeps the load of each step where it is, and when the step ended, so that nothing waits for the device."""

    def __init__(self) -> None:
        self.loads: list[Mapping[str, LoadStats]] = []
        self.ended: list[float] = []

    def __call__(self, _step: int, loads: Mapping[str, LoadStats]) -> None:
        """See `moe.training.trainer.OnStep`."""
        self.ended.append(time.perf_counter())
        self.loads.append(loads)

    @property
    def seconds(self) -> list[float]:
        """Between the ends of steps."""
        return [after - before for before, after in zip(self.ended, self.ended[1:])]


def train(job: Job) -> bool:
    """Do a training and write down what it came to; what went wrong is kept in the job's folder.

    Returns:
        False if the result was there already.

    Raises:
        KeyboardInterrupt: somebody asked to stop; the training will start again from its first step, as the loads of
            its steps are in no checkpoint.
    """
    if read_result(job.result, job.fingerprint) is not None:
        return False
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started
    job.folder.mkdir(parents=True, exist_ok=True)
    log, started = StepLog(), time.time()
    settings = {**job.settings, "run": {**job.settings["run"], "root": str(job.folder), "name": None}}
    try:
        run = launch(settings, on_step=log)
        if run.outcome.status is not Status.FINISHED:
            if is_first:
                shutil.rmtree(run.folder.path)
            raise KeyboardInterrupt
        if is_first:
            write_result(job.result, _result(job, run, log, started))
            shutil.rmtree(run.folder.checkpoints)  # 15 MB, of no use here
            job.error.unlink(missing_ok=True)
    except Exception:
        if is_first:
            job.error.write_text(traceback.format_exc(), encoding="utf-8")
        raise
    return True


def _result(job: Job, run: Run, log: StepLog, started: float) -> Result:
    found = run.outcome.evaluation
    assert found is not None
    return Result(
        format=FORMAT,
        fingerprint=job.fingerprint,
        pair=job.pair,
        sweep=job.sweep,
        router=job.router,
        balance=job.balance,
        kind=kind_of(job.settings["balance"]),
        seed=job.seed,
        top_k=job.settings["model"]["moe"]["top_k"],
        loss=found.loss,
        bits_per_byte=found.bits_per_byte,
        steps=[{layer: stats.to_numbers() for layer, stats in loads.items()} for loads in log.loads],
        evaluation={layer: stats.to_numbers() for layer, stats in found.loads.items()},
        step_seconds=log.seconds,
        seconds=time.time() - started,
        ended=time.time(),
        machine=machine(next(run.model.parameters()).device),
    )


def kind_of(balance: Mapping[str, object]) -> str:
    """What a balance consists of."""
    kinds = {"bias" if name in BIAS_RULES else "loss" for name in balance}
    return " and ".join(sorted(kinds, reverse=True)) or "nothing"


def machine(device: torch.device) -> str:
    """What a training runs on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_fact('model name') or platform.machine()}, {torch.get_num_threads()} threads"
    return f"Python {platform.python_version()}, torch {installed('torch')}, {name}"
