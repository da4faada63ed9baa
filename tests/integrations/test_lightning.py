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


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Tiny()

    def training_step(self, batch, batch_idx):
        return self.model(**batch)["loss"] + moe.balance_loss(self)

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


def fit(module, tmp_path, callbacks, accumulation=2, rows=10, **options):
    """Two epochs of batches of two rows, in order."""
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 2,
        "max_epochs": 2,
        "default_root_dir": tmp_path,
        "accumulate_grad_batches": accumulation,
        "callbacks": callbacks,
    }
    trainer = Trainer(**arguments | options)
    resumed = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    trainer.fit(module, DataLoader(samples(rows), batch_size=2), **resumed)
    return trainer


pytestmark = [
    # Lightning 2.6 calls names that torch 2.13 wants replaced.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # Advice on speed for batches that are worth other processes.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def steps_by_hand(module, accumulation=2, rows=10, epochs=2):
    """Lightning divides by ``accumulate_grad_batches`` also where an epoch's last step has fewer."""
    batches = list(DataLoader(samples(rows), batch_size=2))
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return by_hand(module.model, steps * epochs, divisor=accumulation)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_that_of_the_loop_by_hand(accumulation, tmp_path) -> None:
    module, reporter, watch = Module(), BalanceReporter(pool_steps=2), Watch()
    other = copy.deepcopy(module)
    options = {"logger": CSVLogger(tmp_path, name="csv", version=0)}
    trainer = fit(module, tmp_path, [BalanceCallback(reporter), watch], accumulation, **options)
    loads = steps_by_hand(other, accumulation)
    assert trainer.global_step == reporter.step == len(loads) == (10 if accumulation == 1 else 6)
    assert_same(module.model, other.model)
    moved = [not torch.equal(*pair) for pair in zip(watch.biases, watch.biases[1:])]
    assert moved == ([True] * 9 if accumulation == 1 else [True, False, True, True, False, True, False, True, True][1:])


def test_figures_are_logged_at_logging_steps(tmp_path) -> None:
    """To every logger, beside what Lightning logs itself, and for callbacks that monitor them."""
