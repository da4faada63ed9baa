"""Balance in Lightning's Trainer."""

from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer

from moe.integrations.reporter import BalanceReporter
from moe.layer import balance_step


@final
class BalanceCallback(Callback):
    """Calls ``moe.balance_step`` after each optimizer step, and logs the figures at the Trainer's logging steps.

    The module's ``training_step`` adds ``moe.balance_loss(self)`` to the loss that it returns, which Lightning divides
    by ``accumulate_grad_batches`` as a whole.

    For automatic optimization. With manual optimization it fits where all optimizers step at most once a batch, and in
    the same batch; call ``moe.balance_step`` yourself where they do not. A step that a loss scaler skips (16-bit
    floats, not bfloat16) moves the biases all the same, as Lightning does not tell it from others.

    Args:
        reporter: takes in each step's load; the first process alone reports. None for one with the defaults and no
            sinks.
    """

    def __init__(self, reporter: BalanceReporter | None = None) -> None:
        self.reporter = reporter or BalanceReporter()
        self._step = 0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Note where the run goes on from."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """End the step, if the batch was the last of one.

        No hook follows an optimizer step at once: ``on_before_zero_grad`` comes within the next one, after its forward
        pass. Lightning saves checkpoints after this one.
        """
        if trainer.global_step == self._step:
            return  # more micro-batches to come
        self._step = trainer.global_step
        self.reporter.add(balance_step(pl_module), self._step, report=trainer.is_global_zero)
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.reporter.figures())
