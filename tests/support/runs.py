"""What tests of training runs share."""

from pathlib import Path

from moe.training.metrics import read_metrics
from moe.training.trainer import Trainer

TIMES = {"seconds", "train/tokens_per_second"}
"""Keys that differ between two runs of the same settings."""


def lines_of(root, name="tiny"):
    lines = read_metrics(Path(root) / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def parameters_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def at_step(monkeypatch, step, action):
    """Do something at the start of a step."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == step:
            action(self)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def poison(trainer, bad_steps):
    """Make the loss NaN in some steps."""

    def spoil(model, _, logits):
        return logits * float("nan") if model.training and trainer.step in bad_steps else logits

    trainer.model.register_forward_hook(spoil)
