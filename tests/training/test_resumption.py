"""What ``resume=auto`` goes on from, what it refuses, and what it remembers."""

import os
import signal
from pathlib import Path

import pytest

from moe.checkpoint import CheckpointWarning
from moe.errors import CheckpointError, TrainingError
from moe.training.launch import launch
from moe.training.trainer import Status
from tests.support.runs import at_step, lines_of, poison


class Planted(Exception):  # noqa: N818 (what a test throws to end a run)
    pass


def die_at(monkeypatch, settings, step):
    """Launch a run and end it without any of the care that an interruption takes."""

    def throw(_):
        raise Planted

    with monkeypatch.context() as patch:
        at_step(patch, step, throw)
        with pytest.raises(Planted):
            launch(settings)


def test_without_a_name_it_takes_the_run_with_the_newest_checkpoint(settings, monkeypatch):
    settings["run"]["name"] = None
    older = launch(settings)
    die_at(monkeypatch, settings, 4)
    (newer,) = (path for path in Path(settings["run"]["root"]).iterdir() if path != older.folder.path)
    for path, time in ((older.folder.path, 100), (newer, 200)):
        for checkpoint in path.glob("checkpoints/step_*"):
            os.utime(checkpoint, (time, time))
    (older.folder.path / "a note").write_text("so that this folder is the one that was changed last")
    (Path(settings["run"]["root"]) / "nowhere").symlink_to("gone")
    settings["resume"] = "auto"
    resumed = launch(settings)
    assert resumed.folder.path == newer
    assert resumed.outcome.status is Status.FINISHED


def test_a_run_without_a_checkpoint_starts_again(settings, monkeypatch):
    launch(settings)
    expected = lines_of(settings["run"]["root"])
    settings["run"]["name"], settings["resume"] = "early", "auto"
    die_at(monkeypatch, settings, 2)
    launch(settings)
    assert lines_of(settings["run"]["root"], "early") == expected


def test_nothing_but_damage_is_refused_and_no_line_deleted(settings):
    run = launch(settings)
    before = run.folder.metrics.read_bytes()
    for checkpoint in run.folder.checkpoints.glob("step_*"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    settings["resume"] = "auto"
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        launch(settings)
    assert run.folder.metrics.read_bytes() == before


def test_skips_before_and_after_are_one_count(settings, monkeypatch):
    settings["run"] |= {"max_skipped": 3, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda trainer: (poison(trainer, range(4, 99)), os.kill(os.getpid(), signal.SIGTERM)))
        assert launch(settings).outcome.status is Status.INTERRUPTED
    settings["resume"] = "auto"
    at_step(monkeypatch, 5, lambda trainer: poison(trainer, range(5, 99)))
    with pytest.raises(TrainingError, match="in 3 steps in a row, up to step 7"):
        launch(settings)
    trained = [line for line in lines_of(settings["run"]["root"]) if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in trained] == [0, 0, 0, 0, 1, 2]


def test_settings_that_were_changed_count(settings, monkeypatch):
    die_at(monkeypatch, settings, 4)
    settings["resume"], settings["run"]["batch_size"] = "auto", 4
    settings["optim"]["adamw"]["weight_decay"] = 0.7
    decay = []
    at_step(monkeypatch, 5, lambda trainer: decay.append(trainer.optimizer.param_groups[0]["weight_decay"]))
    launch(settings)
    assert decay == [0.7]
    assert lines_of(settings["run"]["root"])[-1]["tokens"] == 3 * 64 + 9 * 128


def test_another_architecture_is_named(settings):
    launch(settings)
    settings["resume"], settings["model"]["moe"]["num_experts"] = "auto", 6
    with pytest.raises(CheckpointError, match=r"another architecture.*blocks\.1\.ffn"):
        launch(settings)


def test_other_text_is_refused(settings, tmp_path):
    launch(settings)
    (tmp_path / "text.txt").write_text("something else entirely, said often enough\n" * 100)
    settings["resume"] = "auto"
    with pytest.raises(CheckpointError, match="in the same tokens"):
        launch(settings)
