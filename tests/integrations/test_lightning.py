"""Lightning's Trainer: its steps and logs against the same loop by hand."""

import copy
import csv

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import moe
from moe.integrations import BalanceReporter
from moe.integrations.lightning import BalanceCallback
from tests.integrations.loops import LR, Tiny, assert_same, by_hand, of_layers, pooled, samples

pytestmark = [
    # Lightning 2.6 calls what torch 2.13 has a new name for.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Its advice on speed, for batches that are worth other processes.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Tiny()

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch)["loss"]
        self.log("loss", loss)
        return loss + moe.balance_loss(self)

    def validation_step(self, batch, batch_idx):
        self.model(**batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


class Watch(Callback):
    """Kept after each batch, by a callback that comes later than the one of balance."""

    def __init__(self):
        self.metrics, self.biases = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({key: value.item() for key, value in trainer.callback_metrics.items()})
        self.biases.append(pl_module.model.first.router.score_bias.clone())


def fit(module, tmp_path, callbacks, accumulation=2, resume=None, **options):
    """Two epochs of five batches, in order, with validation after each."""
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 2,
        "max_epochs": 2,
        "default_root_dir": tmp_path,
        "accumulate_grad_batches": accumulation,
        "callbacks": callbacks,
    }
    trainer = Trainer(**arguments | options)
    loaders = [DataLoader(samples(rows), batch_size=2) for rows in (10, 3)]
    trainer.fit(module, *loaders, ckpt_path=resume)
    return trainer


def steps_by_hand(module, accumulation=2):
    """Lightning divides by ``accumulate_grad_batches`` also where an epoch's last step has fewer."""
    batches = list(DataLoader(samples(10), batch_size=2))
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return by_hand(module.model, steps * 2, divisor=accumulation)


def near(figures):
    """Lightning keeps figures in float32."""
    return {key.replace("/first", "/model.first").replace("/last", "/model.last"): pytest.approx(value, rel=1e-6)
            for key, value in figures.items()}  # fmt: skip


@pytest.mark.parametrize(("accumulation", "ends"), [(1, range(10)), (2, (1, 3, 4, 6, 8, 9))])
def test_training_is_that_of_the_loop_by_hand(accumulation, ends, tmp_path) -> None:
    module, kept, watch = Module(), [], Watch()
    other = copy.deepcopy(module)
    reporter = BalanceReporter(lambda step, figures: kept.append((step, of_layers(figures))), every=3)
    trainer = fit(module, tmp_path, [BalanceCallback(reporter), watch], accumulation)
    loads = steps_by_hand(other, accumulation)
    assert trainer.global_step == reporter.step == len(loads) == len(ends)
    assert_same(module.model, other.model)
    # The bias has moved by the end of each batch that was a step's last, and of no other.
    before = [torch.zeros(5), *watch.biases]
    assert [batch for batch in range(10) if not torch.equal(before[batch], before[batch + 1])] == list(ends)
    assert kept == [(step, near(pooled(loads[step - 3 : step]))) for step in range(3, len(loads) + 1, 3)]


def test_figures_are_logged_at_logging_steps(tmp_path) -> None:
    """Beside what Lightning logs itself, and for callbacks that monitor them."""
    module, watch = Module(), Watch()
    loads = steps_by_hand(copy.deepcopy(module))
    fit(
        module,
        tmp_path,
        [BalanceCallback(BalanceReporter(pool_steps=2)), watch],
        logger=CSVLogger(tmp_path, name="csv", version=0),
    )
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [1, 3, 5]  # Lightning numbers steps from 0
    for row, end in zip(rows, (2, 4, 6)):
        assert of_layers(row) == near(pooled(loads[end - 2 : end]))
        assert row["loss"] > 0
    assert of_layers(watch.metrics[-1]) == near(pooled(loads[4:]))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the run's that goes on
def test_checkpoints_have_the_moved_biases_and_runs_go_on_from_them(tmp_path) -> None:
    def saving():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    module = Module()
    whole, kept = copy.deepcopy(module), []
    fit(whole, tmp_path, [BalanceCallback()])
    # Named before the callback of balance: Lightning has those that save come last all the same.
    fit(module, tmp_path, [saving(), BalanceCallback()], enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "step=3.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(saved["model.first.router.score_bias"], module.model.first.router.score_bias)
    reporter = BalanceReporter(lambda step, figures: kept.append(step), every=1)
    again = Module()
    fit(again, tmp_path, [saving(), BalanceCallback(reporter)], enable_checkpointing=True, resume=path)
    assert_same(again.model, whole.model)
    assert kept == [4, 5, 6]
