"""Figures in TensorBoard."""

import math
from typing import final

from torch.utils.tensorboard import SummaryWriter

from moe.integrations.reporter import Figures


@final
class TensorBoard:
    """Writes each figure as a scalar, but for those that are not finite.

    Args:
        writer: the run's; its owner closes it.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def __call__(self, step: int, figures: Figures) -> None:
        """Write one report."""
        for key, value in figures.items():
            if math.isfinite(value):
                self._writer.add_scalar(key, value, global_step=step)
        self._writer.flush()
