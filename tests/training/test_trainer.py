"""The loop: what a step does, and what it refuses to do."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import moe
from moe.errors import ConfigError, DataError, TrainingError
from moe.training import launch as launching
from moe.training.launch import launch
from moe.training.metrics import read_metrics
from moe.training.trainer import Status, Trainer
from tests.support.runs import at_step, lines_of, parameters_of, poison


def test_a_run_learns_and_leaves_everything(settings):
    run = launch(settings)
    assert run.outcome.status is Status.FINISHED
    lines = lines_of(settings["run"]["root"])
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert trained[-1]["tokens"] == 12 * 2 * 16 * 2
    assert trained[0]["train/loss"] == pytest.approx(5.55, abs=0.5)  # log 257: nothing is known yet
    assert trained[-1]["train/loss"] < trained[0]["train/loss"] - 0.5
    assert {line["step"] for line in lines if "val/bits_per_byte" in line} == {6, 12}
    assert lines[-1] == {"step": 12, "tokens": 768, "run/status": "finished"}
    load = trained[-1]["balance/load/blocks.1.ffn"]
    assert sum(load) == pytest.approx(1)
    assert trained[-1]["balance/max_vio/blocks.1.ffn"] == pytest.approx(max(load) * 4 - 1, abs=1e-5)
    assert run.folder.report.stat().st_size > 10_000
    assert [p.name for p in sorted(run.folder.checkpoints.glob("step_*"))] == [
        "step_00000006", "step_00000009", "step_00000012"
    ]  # fmt: skip
    assert run.outcome.evaluation.bits_per_byte == pytest.approx(lines[-2]["val/bits_per_byte"])
    assert json.loads(run.folder.summary.read_text())["sample"]


def test_the_same_settings_give_the_same_run(settings):
    first = launch(settings)
    settings["run"]["name"] = "again"
    second = launch(settings)
    assert lines_of(settings["run"]["root"]) == lines_of(settings["run"]["root"], "again")
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.parametrize("checkpointing", ["reentrant", "nonreentrant"])
def test_activation_checkpointing_changes_no_bit(settings, checkpointing):
    launch(settings)
    settings["run"]["name"], settings["model"]["activation_checkpointing"] = "other", checkpointing
    launch(settings)
    assert lines_of(settings["run"]["root"]) == lines_of(settings["run"]["root"], "other")


def test_a_step_that_is_not_finite_is_skipped_and_counted(settings, monkeypatch):
    seen = {}

    def look(trainer):
        seen["before"] = parameters_of(trainer.model)
        poison(trainer, {4})

    at_step(monkeypatch, 4, look)
    original = Trainer._one_step

    def one_step(self, *args):
        original(self, *args)
        if self.step == 5:
            seen["after"] = parameters_of(self.model)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    run = launch(settings)
    assert run.outcome.status is Status.FINISHED
    for name, value in seen["before"].items():  # the selection bias included
        assert torch.equal(seen["after"][name], value), name
    lines = [line for line in lines_of(settings["run"]["root"]) if "train/loss" in line]
    assert [line["train/skipped_steps"] for line in lines] == [0] * 4 + [1] * 8
    assert lines[4]["train/loss"] is None
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


def test_too_many_such_steps_stop_the_run_and_name_the_checkpoint(settings, monkeypatch):
    settings["run"] |= {"max_skipped": 3, "checkpoint_every": 2}
    at_step(monkeypatch, 5, lambda trainer: poison(trainer, range(5, 100)))
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 8 .*step_00000006"):
        launch(settings)
    lines = lines_of(settings["run"]["root"])
    assert lines[-1]["run/status"] == "stopped"
    assert (Path(settings["run"]["root"]) / "tiny" / "report.html").exists()


def test_skips_that_are_not_in_a_row_do_not_stop_it(settings, monkeypatch):
    settings["run"]["max_skipped"] = 2
    at_step(monkeypatch, 0, lambda trainer: poison(trainer, {1, 3, 5, 7}))
    assert launch(settings).outcome.status is Status.FINISHED


def test_accumulation_is_one_large_batch(settings):
    """Two micro-batches of two sequences give the gradient of one batch of four."""
    settings["balance"] = None
    settings["optim"]["schedule"]["warmup_steps"] = 0
    gradients = []
    for size, accumulation in ((2, 2), (4, 1)):
        settings["run"] |= {"name": f"batch{size}", "batch_size": size, "accumulation": accumulation}
        trainer = make_trainer(settings)
        result = trainer.train_step()
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        gradients[-1]["loss"] = result.loss
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-6)


def make_trainer(settings):
    """What ``launch`` builds, without running it."""
    captured = []

    class Stop(Exception):  # noqa: N818 (control flow, no error)
        pass

    def run(self):
        captured.append(self)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        with pytest.raises(Stop):
            launch(settings)
    return captured[0]


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("run", "steps", "abc", "steps='abc' must be a whole number"),
        ("run", "steps", 2.5, "steps=2.5 must be a whole number"),
        ("run", "batch_size", 2.5, "batch_size=2.5 must be a whole number"),
        ("run", "seed", "x", "seed='x' must be a whole number"),
        ("run", "name", 5, "name=5 must be text"),
        ("run", "prompt", 5, "prompt=5 must be text"),
        ("run", "prompt", "a" * 40, "prompt='aaaa.*' has 41 tokens; seq_len=16 leaves no room"),
        ("run", "sample_tokens", -3, "sample_tokens=-3 must be a whole number, 0 or more"),
        ("run", "threads", 0, "threads=0 must be positive"),
        ("run", "foo", 1, "run does not take these options.*foo"),
        ("optim", "adamw", {"weight_decay": -1}, "weight_decay=-1 must be a number, 0 or more"),
        ("optim", "adamw", {"betas": 0.9}, "betas=0.9 must be two numbers"),
        ("optim", "adamw", {"betas": [0.9, 1.0]}, "must be at least 0 and below 1"),
        ("optim", "schedule", {"shape": "flat"}, "optim does not take these options.*shape"),
        ("model", "width", 3, "model does not take these options.*width"),
        ("run", "steps", 0, "steps=0 must be positive"),
        ("run", "seq_len", -1, "seq_len=-1 must be positive"),
        ("run", "precision", "int8", "precision='int8' is unknown; choose one of auto, float32, bfloat16"),
        ("run", "device", "gpu7", "device='gpu7' cannot be used"),
        ("optim", "peak", 0.0, "peak=0.0 must be positive"),
        ("data", "path", "/no/such/text", "/no/such/text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_named_before_anything_is_written(settings, group, key, value, message):
    settings[group][key] = value
    with pytest.raises(moe.errors.MoEError, match=message):
        launch(settings)
    assert not Path(settings["run"]["root"]).exists()


def test_an_unknown_resume_is_named(settings):
    settings["resume"] = "always"
    with pytest.raises(ConfigError, match="resume='always' is unknown; choose 'never' or 'auto'"):
        launch(settings)


def test_a_dense_model_trains_too(settings):
    settings["model"]["moe"] = None
    run = launch(settings)
    assert run.outcome.status is Status.FINISHED
    assert not any(key.startswith("balance/") for line in lines_of(settings["run"]["root"]) for key in line)


def test_bfloat16_autocast_trains(settings):
    launch(settings)
    settings["run"] |= {"precision": "bfloat16", "name": "half"}
    launch(settings)
    exact, half = (lines_of(settings["run"]["root"], name) for name in ("tiny", "half"))
    assert half[0]["train/loss"] != exact[0]["train/loss"]
    assert half[0]["train/loss"] == pytest.approx(exact[0]["train/loss"], rel=1e-2)
    half = [line for line in half if "train/loss" in line]
    assert half[-1]["train/loss"] < half[0]["train/loss"] - 0.5


def test_seconds_and_speed_are_those_of_the_clock(settings, monkeypatch):
    """A clock that moves by 1 at each look: every step takes the same time, and the run what its last line says."""
    ticks = itertools.count()
    original = Trainer.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options, clock=lambda: float(next(ticks)))

    monkeypatch.setattr(Trainer, "__init__", init)
    run = launch(settings)
    lines = read_metrics(run.folder.metrics)
    trained = [line for line in lines if "train/loss" in line]
    assert {line["train/tokens_per_second"] for line in trained} == {2 * 16 * 2 / 1.0}
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[-1] - run.outcome.seconds <= 1
    assert run.outcome.seconds > 12


def test_the_sample_is_always_the_same(settings):
    run = launch(settings)
    data = launching.prepare(**settings["data"], **settings["tokenizer"])
    first = launching.sample(run.model, data, [256, 116], 100)  # more than there is room for: cut short
    assert first == launching.sample(run.model, data, [256, 116], 100)


def test_text_too_short_to_validate_is_refused_before_anything_is_written(settings, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "long.txt").write_text("many words that go on and on\n" * 100)
    (folder / "short.txt").write_text("few")
    settings["data"]["path"] = str(folder)
    with pytest.raises(DataError, match=r"text has 4 tokens, fewer than the 17 that a sequence of seq_len=16 takes"):
        launch(settings)
    assert not Path(settings["run"]["root"]).exists()
