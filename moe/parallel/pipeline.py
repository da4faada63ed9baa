"""Pipeline parallelism: a decoder in stages, by PyTorch's own schedules.

The balance losses of a stage cannot reach the loss, which only the last stage computes. Each stage therefore adds the
gradient of its own to what comes back through its output, with the weight that it has in the loss, as
Megatron-LM does with its ``MoEAuxLossAutoScaler``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from moe.config import require_positive_integer
from moe.errors import ConfigError, ShapeError
from moe.layer import balance_loss, balance_step
from moe.models.decoder import Decoder, check_inputs
from moe.models.stage import split_decoder
from moe.monitor import LoadStats
from moe.parallel.consistency import require_same_everywhere
from moe.parallel.mesh import ParallelMesh
from moe.parallel.parallelize import Parallel, describe, parallelize

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets of a micro-batch to the mean over its tokens."""


@final
class Pipeline:
    """A decoder over the ``pp`` axis of a mesh, and over its other axes within each stage.

    Args:
        decoder: whole, the same on all ranks; its modules become those of the stages.
        mesh: of this rank.
        loss: of a micro-batch.
        microbatches: parts of a batch that are under way at once; at least ``pp``.
        stages_per_rank: more than one interleaves them (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).
        options: as for :func:`moe.parallel.parallelize`.

    Attributes:
        parallel: this rank's stages as one spread model; clip gradients and read parameters by it.

    Raises:
        ConfigError: too few blocks, tied embeddings, or ranks that disagree.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: ParallelMesh,
        loss: Loss,
        *,
        microbatches: int,
        stages_per_rank: int = 1,
        **options: Any,
    ) -> None:
        require_positive_integer(microbatches=microbatches, stages_per_rank=stages_per_rank)
        pp = mesh.degrees.pp
        if pp < 2:
            raise ConfigError(f"pp={pp} is no pipeline; use moe.parallelize")
        pipeline = f"microbatches={microbatches}, stages_per_rank={stages_per_rank}"
        require_same_everywhere({**describe(decoder), "pipeline": pipeline}, mesh.world)
        self.mesh, self.loss, self.microbatches = mesh, loss, microbatches
        stages = split_decoder(decoder, pp * stages_per_rank)
        if microbatches < pp:
            raise ConfigError(f"microbatches={microbatches} must be at least pp={pp}")
        self.numbers = range(mesh.rank_on("pp"), len(stages), pp)
        own = [stages[number] for number in self.numbers]
        self.num_stages, self.config = len(stages), decoder.config
        self.parallel = Parallel.merge([parallelize(stage, mesh, **options) for stage in own])
        self._scale = 1.0
        self._balance: list[Tensor] = []
        for stage in own:
            stage.register_forward_hook(self._add_balance)
        self._shape: torch.Size | None = None

    def step(self, tokens: Tensor, targets: Tensor, *, token_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Forward and backward of one batch; gradients add up until they are cleared.

        Args:
            tokens: ``(B, S)``, this data rank's; every stage gets them.
            targets: ``(B, ...)`` likewise, split into micro-batches like the tokens and handed to the loss.
            token_mask: ``(B, S)`` bool, True for real tokens; likewise.
            scale: factor on the loss, 1 / n where n calls make one optimizer step.

        Returns:
            The loss, balance losses included and mean over micro-batches, scalar; the same on all stages.

        Raises:
            ShapeError: the batch is no multiple of the micro-batches, or not what :class:`moe.models.Decoder` takes.
            DtypeError: likewise.
        """
        check_inputs(self.config, tokens, token_mask, None)
        if len(tokens) % self.microbatches:
            raise ShapeError(f"a batch of {len(tokens)} sequences is no multiple of microbatches={self.microbatches}")
        is_new = tokens.shape != self._shape
        if is_new:
            self._schedule, self._shape = self._make_schedule(tokens), tokens.shape
        self._scale = scale / self.microbatches
        self._balance.clear()
        losses: list[Tensor] = []
        is_last = self.num_stages - 1 in self.numbers
        inputs = (tokens.contiguous(),) if 0 in self.numbers else ()
        padding = {} if token_mask is None else {"token_mask": token_mask.contiguous()}
        target = targets if is_last else None
        with self._set_aside_gradients() if is_new else nullcontext():
            self._schedule.step(*inputs, target=target, losses=losses, return_outputs=False, **padding)
        total = torch.stack([torch.zeros((), device=tokens.device, dtype=self._dtype), *losses, *self._balance]).sum()
        dist.all_reduce(total.detach_(), group=self.mesh.group("pp"))
        return total / scale

    def balance_step(self, *, skipped: bool = False) -> dict[str, LoadStats]:
        """:func:`moe.balance_step` of this rank's stages; call it after each optimizer step."""
        loads: dict[str, LoadStats] = {}
        for stage in self.parallel.parts:
            loads |= balance_step(stage, skipped=skipped)
        return loads

    @contextmanager
    def _set_aside_gradients(self) -> Iterator[None]:
        """For the first run of a schedule, at whose beginning PyTorch clears the gradients of what FSDP2 shards."""
        held = [(p, p.grad) for _, p in self.parallel.named_parameters() if p.grad is not None]
        for parameter, _ in held:
            parameter.grad = None
        yield
        for parameter, gradient in held:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(next(self.parallel.parts[0].parameters()).dtype, torch.float32)

    def _make_schedule(self, tokens: Tensor) -> Any:
        """Stages with the shapes of their inputs and outputs, which PyTorch would otherwise find by a trial run."""
        size = len(tokens) // self.microbatches
        dtype = next(self.parallel.parts[0].parameters()).dtype
        hidden = torch.empty(size, tokens.shape[1], self.config.dim, dtype=dtype, device="meta", requires_grad=True)
        logits = torch.empty(size, tokens.shape[1], self.config.vocab_size, dtype=self._dtype, device="meta")
        ids = torch.empty(size, tokens.shape[1], dtype=tokens.dtype, device="meta")
        stages: list[Any] = [
            PipelineStage(
                module,
                number,
                self.num_stages,
                tokens.device,
                input_args=ids if number == 0 else hidden,
                output_args=logits if number == self.num_stages - 1 else hidden,
                group=self.mesh.group("pp"),
            )
            for number, module in zip(self.numbers, self.parallel.parts)
        ]
        options: dict[str, Any] = {"loss_fn": self._scaled_loss, "scale_grads": False}
        if len(stages) == 1:
            return Schedule1F1B(stages[0], self.microbatches, **options)
        return ScheduleInterleaved1F1B(stages, self.microbatches, **options)

    def _scaled_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.loss(logits, targets) * self._scale

    def _add_balance(self, stage: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Forward hook: the stage's own balance losses of this micro-batch."""
        if not (stage.training and torch.is_grad_enabled()):
            return output
        loss = balance_loss(stage) * self._scale
        self._balance.append(loss.detach().to(self._dtype))
        added: Tensor = _WithLoss.apply(output, loss)
        return added


class _WithLoss(torch.autograd.Function):
    """The output itself; in backward the loss gets a gradient of 1, as if it were added to the model's loss."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.saved_tensors[0]
