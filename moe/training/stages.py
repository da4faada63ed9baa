"""A decoder in pipeline stages, behind what the training loop asks of one device."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from moe.models import Decoder
from moe.parallel import ParallelMesh
from moe.parallel.pipeline import Pipeline
from moe.parallel.world import add_up, hand_on
from moe.training.data import Batch
from moe.training.runner import Autocast, cross_entropy


@final
class Stages:
    """How a share of a batch goes through this process's stages of a decoder and through those of others.

    Args:
        decoder: whole; its modules become those of the stages.
        mesh: of this rank.
        microbatches: parts of a share that are under way at once.
        stages_per_rank: more than one interleaves them.
        options: as for :func:`moe.parallel.parallelize`.
    """

    def __init__(
        self, decoder: Decoder, mesh: ParallelMesh, microbatches: int, stages_per_rank: int, options: Mapping[str, Any]
    ) -> None:
        self._device = next(decoder.parameters()).device
        self._losses: list[Tensor] = []
        sizes = {"microbatches": microbatches, "stages_per_rank": stages_per_rank}
        self.pipeline = Pipeline(decoder, mesh, self._loss, **sizes, **options)
        self._group = mesh.group("pp")

    def forward_backward(self, batch: Batch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """See `moe.training.runner.Runner.forward_backward`."""
        self._losses.clear()
        with autocast:
            both = self.pipeline.step(batch["inputs"].to(self._device), batch["targets"].to(self._device), scale=scale)
        here = torch.stack([torch.zeros_like(both), *self._losses]).sum() / self.pipeline.microbatches
        loss = add_up(here, self._group)  # the last stage alone has any
        return loss, both - loss

    def summed_loss(self, batch: Batch, autocast: Autocast) -> Tensor:
        """One stage after another, each handing on to all; see `moe.training.runner.Runner.summed_loss`."""
        x, pipeline = batch["inputs"].to(self._device), self.pipeline
        stages = dict(zip(pipeline.numbers, pipeline.parallel.parts))
        between = (*x.shape, pipeline.config.dim)
        dtype = next(pipeline.parallel.parts[0].parameters()).dtype
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for number in range(pipeline.num_stages):
            if number in stages:
                with autocast:
                    x = stages[number](x)
            else:
                x = torch.empty(between, dtype=dtype, device=self._device)
            if number < pipeline.num_stages - 1:
                x = hand_on(x.to(dtype).contiguous(), number % self._group.size(), self._group)
            elif number in stages:
                loss += cross_entropy(x, batch["targets"].to(self._device), reduction="sum").double()
        return add_up(loss, self._group)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = cross_entropy(logits, targets)
        self._losses.append(loss.detach())
        return loss
