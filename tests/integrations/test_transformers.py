"""The Trainer of transformers: its gradients, steps and logs against the same loop by hand."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments

import moe
from moe.errors import ConfigError
from moe.integrations import BalanceReporter
from moe.integrations.transformers import BalanceCallback, balance_trainer
from tests.integrations.llama import moe_llama, sentences
from tests.integrations.loops import LR, Tiny, assert_same, by_hand, mean_loss, of_layers, pooled, samples


def make(model, data, tmp_path, trainer_class=Trainer, accumulation=2, batch_size=2, **options):
    """A Trainer on the CPU with SGD, and the batches that it will have seen."""
    seen = []

    def collate(rows):
        seen.append(default_collate(rows))
        return dict(seen[-1])

    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }
    own = {key: options.pop(key) for key in ("compute_loss_func", "callbacks", "eval_dataset") if key in options}
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    constant = torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**arguments | options),
        train_dataset=data,
        data_collator=collate,
        optimizers=(sgd, constant),
        **own,
    )
    return trainer, seen


def steps_of(seen, accumulation=2, epochs=2):
    """Micro-batches by step; an epoch's last step has what is left."""
    size = len(seen) // epochs
    batches = [seen[start : start + size] for start in range(0, len(seen), size)]
    return [epoch[start : start + accumulation] for epoch in batches for start in range(0, size, accumulation)]


def cross_entropy(model, batch, reduction):
    """Of each next token, in float32 as the library has it."""
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    logits = model(input_ids=batch["input_ids"]).logits.float().flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction=reduction)


def loss_by_labels(model, batch, micro_batches):
    """All labels of the step count alike; times the micro-batches, by which `by_hand` divides."""
    items = sum(int((other["labels"][:, 1:] != -100).sum()) for other in micro_batches)
    return cross_entropy(model, batch, "sum") / items * len(micro_batches)


def loss_by_mean(model, batch, _micro_batches):
    return cross_entropy(model, batch, "mean")


def over_the_step(outputs, labels, num_items_in_batch):
    """A user's compute_loss_func."""
    return (outputs["y"] - labels).square().sum() / num_items_in_batch


class OwnLoss(Trainer):
    """A subclass with a loss of its own, a mean over its micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class Scaled(OwnLoss):
    """Another, which divides for itself."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / self.current_gradient_accumulation_steps


TRAINERS = {  # what divides the loss: the Trainer, the model by labels, compute_loss_func, subclasses
    "mean": (Tiny, samples, mean_loss, {}),
    "labels": (moe_llama, sentences, loss_by_labels, {}),
    "function": (Tiny, samples, mean_loss, {"compute_loss_func": over_the_step}),
    "own loss": (moe_llama, sentences, loss_by_mean, {"trainer_class": OwnLoss}),
    "own division": (moe_llama, sentences, loss_by_mean, {"trainer_class": Scaled}),
}


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_is_that_of_the_loop_by_hand(kind, accumulation, tmp_path) -> None:
    make_model, data, loss_of, options = TRAINERS[kind]
    model = make_model()
    other = copy.deepcopy(model)
    # 5 micro-batches an epoch: the last step of an epoch has 2 of them, or 1.
    trainer, seen = make(model, data(10), tmp_path, accumulation=accumulation, **options)
    reporter = BalanceReporter(pool_steps=2)
    balance_trainer(trainer, reporter)
    trainer.train()
    loads = by_hand(other.train(), steps_of(seen, accumulation), loss_of)
    assert trainer.state.global_step == len(loads) == reporter.step
    assert_same(model, other, 1e-12 if make_model is Tiny else 1e-7)  # Llama's loss is float32 in a float64 model too
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(2, len(loads) + 1, 2))
    for entry in logs:
        assert of_layers(entry) == pooled(loads[entry["step"] - 2 : entry["step"]])
        assert {key for key in entry if "/worst/" in key} >= {"balance/worst/max_vio", "balance/worst/entropy"}
    assert not of_layers(trainer.state.log_history[-1])  # the summary of the run


def test_training_with_activation_checkpointing(tmp_path) -> None:
    model = moe_llama()
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": moe.checkpoint_contexts})
    trainer, seen = make(model, sentences(6), tmp_path, num_train_epochs=1)
    balance_trainer(trainer)
    trainer.train()
    other = moe_llama()
    loads = by_hand(other, steps_of(seen, epochs=1), loss_by_labels)
    assert_same(model, other, 1e-7)
    assert of_layers(trainer.state.log_history[0]) == pooled(loads)


def test_evaluation_is_neither_counted_nor_penalised(tmp_path) -> None:
    model = Tiny()
    trainer, _ = make(model, samples(8), tmp_path, eval_dataset=samples(3), eval_strategy="steps", eval_steps=1)
    balance_trainer(trainer)
    trainer.train()
    train = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4
    assert len(train) == 2
    assert not any(map(of_layers, evaluated))
    with torch.no_grad():
        batch = default_collate(samples(3))
        assert evaluated[-1]["eval_loss"] == pytest.approx(mean_loss(model.eval(), batch, None).item())
    assert moe.take_evaluation_load(model)["first"].tokens == 7 * 3 * 5  # four times in training, and just now


def test_evaluation_before_any_training(tmp_path) -> None:
    model = moe_llama()
    trainer, _ = make(model, sentences(2), tmp_path, eval_dataset=sentences(2))
    plain = trainer.evaluate()["eval_loss"]
    balance_trainer(trainer)
    assert trainer.evaluate()["eval_loss"] == plain


def test_the_callback_alone(tmp_path) -> None:
    """For a Trainer whose loss has the balance loss in it; the model's own tracker sees each step once."""

    class Balanced(OwnLoss):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs) + moe.balance_loss(model)

    kept = []
    reporter = BalanceReporter(lambda step, figures: kept.append((step, figures)), every=2)
    model = Tiny()
    other = copy.deepcopy(model)
    callbacks = [BalanceCallback(reporter)]
    trainer, seen = make(model, samples(10), tmp_path, Balanced, callbacks=callbacks, num_train_epochs=1)
    trainer.train()
    loads = by_hand(other, steps_of(seen, epochs=1))
    assert_same(model, other)
    assert [(step, of_layers(figures)) for step, figures in kept] == [(2, pooled(loads[:2]))]


def test_only_the_first_process_reports(tmp_path) -> None:
    kept = []
    trainer, _ = make(Tiny(), samples(4), tmp_path)
    balance_trainer(trainer, BalanceReporter(lambda step, figures: kept.append(step), every=1))
    trainer.state.is_world_process_zero = False

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = state.global_step == 1

    trainer.add_callback(Second())
    trainer.train()
    assert kept == [2]


def test_a_skipped_step_leaves_the_biases(tmp_path) -> None:
    class Skipping(TrainerCallback):
        """What accelerate's wrapper says after a gradient that was not finite."""

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer._is_overflow = state.global_step == 0

        def on_step_end(self, args, state, control, model=None, **kwargs):
            biases.append(model.first.router.score_bias.clone())

    biases = []
    trainer, _ = make(Tiny(), samples(8), tmp_path, callbacks=[Skipping()], num_train_epochs=1)
    balance_trainer(trainer)
    trainer.train()
    assert biases[0].abs().max() == 0
    assert biases[1].abs().max() > 0


def test_copies_of_data_parallel_are_refused(tmp_path) -> None:
    trainer, _ = make(Tiny(), samples(2), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="n_gpu=2"):
        balance_trainer(trainer)
