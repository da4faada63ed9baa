"""The loop: what a step does, and what it refuses to do."""

import json
from pathlib import Path

import pytest
import torch

import moe
from moe.errors import ConfigError, TrainingError
from moe.training import launch as launching
from moe.training.launch import launch
from moe.training.trainer import Status, Trainer
from tests.support.runs import at_step, lines_of, parameters_of


def test_a_run_learns_and_leaves_everything(settings):
    run = launch(settings)
    assert run.status is Status.FINISHED
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
    assert run.evaluation.bits_per_byte == pytest.approx(lines[-2]["val/bits_per_byte"])
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


def poison(trainer, bad_steps):
    """Make the loss NaN in some steps."""

    def spoil(model, _, logits):
        return logits * float("nan") if model.training and trainer.step in bad_steps else logits

    trainer.model.register_forward_hook(spoil)


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
    assert run.status is Status.FINISHED
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
    assert launch(settings).status is Status.FINISHED


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
        ("run", "steps", 0, "steps=0 must be positive"),
        ("run", "seq_len", -1, "seq_len=-1 must be positive"),
        ("run", "precision", "int8", "precision='int8' is unknown; choose one of auto, float32, bfloat16"),
        ("run", "device", "gpu7", "device='gpu7' cannot be used"),
        ("optim", "peak", 0.0, "peak=0.0 must be positive"),
        ("data", "path", "/no/such/text", "/no/such/text"),
    ],
)
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
    assert run.status is Status.FINISHED
    assert not any(key.startswith("balance/") for line in lines_of(settings["run"]["root"]) for key in line)


def test_bfloat16_autocast_trains(settings):
    settings["run"]["precision"] = "bfloat16"
    launch(settings)
    lines = [line for line in lines_of(settings["run"]["root"]) if "train/loss" in line]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5


def test_the_sample_is_always_the_same(settings):
    run = launch(settings)
    data = launching.prepare(**settings["data"], **settings["tokenizer"])
    first = launching.sample(run.model, data, "the ", 20)
    assert first == launching.sample(run.model, data, "the ", 20)
