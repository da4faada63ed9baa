"""Balance in the Trainer of the transformers library."""

from collections.abc import Callable
from functools import wraps
from typing import Any, final

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe.errors import ConfigError
from moe.integrations.reporter import BalanceReporter
from moe.layer import balance_loss, balance_step


def balance_trainer(trainer: Trainer, reporter: BalanceReporter | None = None) -> None:
    """Have a Trainer, or an object of a subclass, balance the MoE layers of its model.

    Call it once, before ``trainer.train()``. From then on:

    * the loss of a micro-batch in training has ``moe.balance_loss`` added to it, such that under gradient accumulation
      the gradient is that of the mean over the step's micro-batches. (A Trainer divides a loss by the number of
      micro-batches, or else by the number of all their labels, of which a balance loss knows nothing.)
    * ``moe.balance_step`` follows each optimizer step, see `BalanceCallback`.
    * what the Trainer logs of a training step has the reporter's figures in it, so its trackers and its
      ``state.log_history`` do too.

    Args:
        trainer: with its model.
        reporter: pools the figures; its own sinks get reports too. None for one with the defaults and no sinks.

    Raises:
        ConfigError: the Trainer would run ``nn.DataParallel``, whose copies of the model lose what they counted.
    """
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"trainer.args.n_gpu={trainer.args.n_gpu} must be at most 1: nn.DataParallel throws its copies of the "
            "model away, and what they counted with them; start a process a GPU, with torchrun"
        )
    reporter = reporter or BalanceReporter()
    trainer.add_callback(BalanceCallback(reporter))
    # On the object and not in a subclass, so that it works with whatever class the Trainer is of.
    vars(trainer).update(
        compute_loss=_with_balance_loss(trainer, trainer.compute_loss),
        log=_with_figures(reporter, trainer.log),
    )


@final
class BalanceCallback(TrainerCallback):
    """Calls ``moe.balance_step`` after each optimizer step, once however many micro-batches it had.

    `balance_trainer` adds it. By itself it suits a Trainer whose ``compute_loss`` adds ``moe.balance_loss`` already.
    Where a loss scaler skipped the step, the biases stay too.

    Args:
        reporter: takes in each step's load; the first process alone reports.
    """

    def __init__(self, reporter: BalanceReporter | None = None) -> None:
        self.reporter = reporter or BalanceReporter()

    def on_optimizer_step(
        self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the step."""
        # accelerate's wrapper of the optimizer knows; another optimizer skips nothing.
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        loads = balance_step(kwargs["model"], skipped=skipped)
        self.reporter.add(loads, state.global_step + 1, report=state.is_world_process_zero)


def _with_balance_loss(trainer: Trainer, plain: Callable[..., Any]) -> Callable[..., Any]:
    """``Trainer.compute_loss`` with the balance loss in training."""

    @wraps(plain)
    def compute_loss(
        model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        found = plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return found
        loss, outputs = found if return_outputs else (found, None)
        divided = not _is_scaled(trainer, num_items_in_batch)
        loss = loss + balance_loss(model).to(loss) / (1 if divided else trainer.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def _is_scaled(trainer: Trainer, num_items_in_batch: Tensor | int | None) -> bool:
    """Whether ``Trainer.training_step`` takes a loss as it is, and does not divide it by the number of micro-batches.

    The rule of transformers 4.57 to 5.24; the attribute that can overrule it is younger than 4.57.
    """
    told: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return told
    by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_items or trainer.compute_loss_func is not None


def _with_figures(reporter: BalanceReporter, plain: Callable[..., None]) -> Callable[..., None]:
    """``Trainer.log`` with the figures among those of a training step, which alone have a ``loss``."""

    @wraps(plain)
    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(reporter.figures())
        plain(logs, *args, **kwargs)

    return log
