"""All-to-all of rows, differentiable, and begun before it is waited for.

An exchange is two autograd nodes, departure and arrival, with whatever may overlap between them. Backward goes the
other way: the arrival's node sends the gradients off, and the departure's waits for them. Collectives so run in the
same order on all ranks, since the engine runs nodes in the reverse of the order in which they were made. That holds as
long as every rank makes the same nodes, whatever needs a gradient there: see ``ExpertParallel``. Backward may run twice
over a kept graph; a gradient of a gradient is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.kernels.backends import backend_of
from moe.kernels.combine import SUM_ROWS
from moe.kernels.gather import gather_rows
from moe.types import Plan


@final
@dataclass
class Transfer:
    """One exchange under way, of any number of tensors with the same rows."""

    group: dist.ProcessGroup
    sent: list[int]
    """Rows to each rank of the group."""
    received: list[int]
    """Rows from each."""
    _works: list[dist.Work] = field(default_factory=list)
    _sent: list[Tensor] = field(default_factory=list)
    _arriving: tuple[Tensor, ...] = ()

    def begin(self, tensors: Sequence[Tensor], *, back: bool = False) -> tuple[Tensor, ...]:
        """Send rows off; the results hold nothing before ``wait``.

        Args:
            tensors: ``(rows sent, ...)``; ``(rows received, ...)`` for the way back.
            back: return to every rank what came from it, which is what gradients do.
        """
        to, come = (self.received, self.sent) if back else (self.sent, self.received)
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._arriving = tuple(tensor.new_empty(sum(come), *tensor.shape[1:]) for tensor in tensors)
        self._works = [
            dist.all_to_all_single(out, tensor, come, to, group=self.group, async_op=True)
            for out, tensor in zip(self._arriving, self._sent)
        ]
        return self._arriving

    def wait(self) -> tuple[Tensor, ...]:
        """What was begun, once it has arrived; on a GPU the stream waits, not the host."""
        for work in self._works:
            work.wait()
        arrived, self._arriving, self._works, self._sent = self._arriving, (), [], []
        return arrived


def depart(transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Begin an exchange; pass the results to :func:`arrive` before anything reads them."""
    departed: tuple[Tensor, ...] = _Depart.apply(transfer, *tensors)
    return departed


def arrive(transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Wait for what :func:`depart` began."""
    arrived: tuple[Tensor, ...] = _Arrive.apply(transfer, *tensors)
    return arrived


def sum_rows(rows: Tensor, plan: Plan) -> Tensor:
    """Each token's rows added up in the order of ``plan.rows``, in float32 at least; its gradient is a gather.

    Args:
        rows: ``(S, D)``, S of them in the plan.
        plan: of T tokens.

    Returns:
        ``(T, D)``, dtype of ``rows``.
    """
    summed: Tensor = _SumRows.apply(rows, plan)
    return summed


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor itself; its gradient is multiplied."""
    if factor == 1:
        return tensor
    scaled: Tensor = _ScaleGradient.apply(tensor, factor)
    return scaled


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        return transfer.begin(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        del gradients  # they are on their way since the arrival's node
        return None, *ctx.transfer.wait()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfer: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.transfer = transfer
        transfer.wait()
        ctx.mark_dirty(*tensors)  # the same memory, which holds something only now
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.transfer.begin(gradients, back=True)
        return None, *gradients  # of the right shape; the departure's node has the right values


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        summed: Tensor = SUM_ROWS[backend_of(rows)](rows, plan.rows)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradient, ctx.plan), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
