"""How a run ends before its last step, and how it goes on: kills, signals, full disks, other settings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointStore
from moe.errors import CheckpointError, TrainingError
from moe.training.launch import launch
from moe.training.metrics import MetricsWriter
from moe.training.trainer import Status
from tests.support.runs import at_step, lines_of


@pytest.fixture(autouse=True)
def _signals():
    """Python's own handlers, also where the tests run in the background, which ignores Ctrl-C."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


KILLED = """
import json, os, signal, sys
from moe.training.launch import launch
from moe.training.trainer import Trainer

original = Trainer.train_step
def train_step(self):
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)
Trainer.train_step = train_step
launch(json.loads(sys.argv[1]))
"""


def test_a_killed_run_resumes_bit_for_bit(settings):
    """SIGKILL between steps 7 and 8; the newest checkpoint is of step 6, so a step is done again."""
    expected = launch(settings)
    expected_lines = lines_of(settings["run"]["root"])
    settings["run"]["name"] = "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, json.dumps(settings)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert lines_of(settings["run"]["root"], "killed")[-1]["step"] == 7
    settings["resume"] = "auto"
    torch.manual_seed(99)  # whatever the new process starts from
    resumed = launch(settings)
    assert lines_of(settings["run"]["root"], "killed") == expected_lines
    for name, value in expected.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_with_a_checkpoint_and_resumes(settings, monkeypatch, number):
    launch(settings)
    expected = lines_of(settings["run"]["root"])
    settings["run"]["name"] = "interrupted"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda _: os.kill(os.getpid(), number))
        run = launch(settings)
    assert run.outcome.status is Status.INTERRUPTED
    lines = lines_of(settings["run"]["root"], "interrupted")
    assert lines[-1]["run/status"] == "interrupted"
    assert lines[-1]["step"] == 5  # the step in which the signal came is finished
    assert (run.folder.checkpoints / "step_00000005").is_dir()
    assert run.folder.report.exists()
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    settings["resume"] = "auto"
    launch(settings)
    assert lines_of(settings["run"]["root"], "interrupted") == expected


def test_a_second_interrupt_is_not_waited_for(settings, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        launch(settings)


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_the_way_is_a_warning(settings, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda trainer: patch.setattr(trainer.store, "_write", no_space))
        at_step(patch, 7, lambda trainer: patch.undo())
        with pytest.warns(RuntimeWarning, match=r"goes on without this checkpoint: .*No space left.*step_00000003"):
            run = launch(settings)
    assert run.outcome.status is Status.FINISHED
    names = [path.name for path in sorted(run.folder.checkpoints.glob("step_*"))]
    assert names == ["step_00000003", "step_00000009", "step_00000012"]


def test_a_full_disk_at_the_end_is_an_error_and_the_former_checkpoint_is_whole(settings, monkeypatch):
    at_step(monkeypatch, 11, lambda trainer: monkeypatch.setattr(trainer.store, "_write", no_space))
    with pytest.raises(CheckpointError, match=r"No space left.*the last good checkpoint is .*step_00000009"):
        launch(settings)
    folder = Path(settings["run"]["root"]) / "tiny" / "checkpoints"
    assert CheckpointStore(folder).latest().step == 9


def test_metrics_that_cannot_be_written_stop_the_run_and_name_the_checkpoint(settings, monkeypatch):
    write = MetricsWriter.write

    def full(self, step, values):
        if step == 8:
            no_space()
        write(self, step, values)

    monkeypatch.setattr(MetricsWriter, "write", full)
    with pytest.raises(TrainingError, match=r"step 8: .*No space left.*the last good checkpoint is .*step_00000006"):
        launch(settings)
