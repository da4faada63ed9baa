"""What a step measured, and what a run came to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from moe.training.evaluate import Evaluation


class Status(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    """All steps are done."""
    INTERRUPTED = "interrupted"
    """Somebody asked it to stop; it can be resumed."""
    STOPPED = "stopped"
    """Too many steps in a row were not finite."""


@final
@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured, on the device."""

    loss: Tensor
    """Mean cross entropy of the step's micro-batches, nats per token."""
    balance_loss: Tensor
    """Mean over them of what was added to it."""
    gradient_norm: Tensor
    """Before clipping."""

    def is_finite(self) -> bool:
        """Whether the step may be taken; waits for the device."""
        return bool(torch.isfinite(self.loss + self.balance_loss + self.gradient_norm))


@final
@dataclass(frozen=True)
class Outcome:
    """What ``Trainer.run`` came to."""

    status: Status
    seconds: float
    """Time spent in training, validations included, that before a resumption too."""
    evaluation: Evaluation | None
    """The validation after the last step; None where the run was interrupted between two, or had no step left."""
