"""Balance in loops of the accelerate library."""

from typing import final

from accelerate import Accelerator
from torch import nn

from moe.integrations.reporter import BalanceReporter, Figures
from moe.layer import balance_step


def step_if_synced(
    accelerator: Accelerator, model: nn.Module, reporter: BalanceReporter, step: int | None = None
) -> None:
    """Call ``moe.balance_step`` if an optimizer step has just been made; do nothing within an accumulation.

    ::

        with accelerator.accumulate(model):
            loss = loss_of(model(x), y) + moe.balance_loss(model)
            accelerator.backward(loss)  # divides by the number of micro-batches
            optimizer.step()
            optimizer.zero_grad()
            step_if_synced(accelerator, model, reporter)

    Where a loss scaler skipped the step, the biases stay too.

    Args:
        accelerator: that prepared the model.
        model: as it was prepared; layers are reported by their names in the model before that.
        reporter: takes in each step's load; the first process alone reports.
        step: optimizer steps done, this one included; None for one more than the last time. Give it in a run that goes
            on from a checkpoint, or its reports begin with step 1 again.
    """
    if accelerator.sync_gradients:
        whole = accelerator.unwrap_model(model, keep_torch_compile=False)
        loads = balance_step(whole, skipped=accelerator.optimizer_step_was_skipped)
        reporter.add(loads, step, report=accelerator.is_main_process)


@final
class Trackers:
    """A sink: hands figures to the trackers of an Accelerator.

    Args:
        accelerator: ``accelerator.init_trackers`` has been called, or will be before the first report.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __call__(self, step: int, figures: Figures) -> None:
        """Log one report."""
        self._accelerator.log(dict(figures), step=step)
