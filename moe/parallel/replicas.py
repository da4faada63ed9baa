"""A dispatcher for tokens that several ranks hold alike: each takes its part, and all get the sum of all.

Under tensor parallelism every rank of the ``tp`` axis has all tokens of the data rank, and makes the same decision.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch import Dispatcher, Experts
from moe.parallel.collectives import all_gather
from moe.types import Routing


@final
@dataclass(frozen=True)
class SharedTokens:
    """Each rank of a group dispatches its part of the tokens that all of them have.

    Whatever comes before it stays the same on all ranks of the group, gradients included: those of tokens and weights
    are gathered from the ranks that used them.

    Attributes:
        inner: what each part goes through.
        group: the ranks.
    """

    inner: Dispatcher
    group: dist.ProcessGroup

    def run(self, experts: Experts, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """The sum of each token's experts, on every rank of the group."""
        size, rank = self.group.size(), self.group.rank()
        share = -(-len(x) // size)
        own = slice(rank * share, (rank + 1) * share)
        part, weights = _TakePart.apply(self.group, x, routing.weights)
        nothing = weights.new_empty(len(weights), 0)  # scores and logits stay with the router
        here = Routing(routing.expert_ids[own], weights, nothing, nothing)
        y: Tensor = _GiveAll.apply(self.group, len(x), self.inner.run(experts, part, here))
        return y


def gather_parts(part: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, one after another; each but the last ones has ``ceil(num_rows / ranks)`` rows."""
    share = -(-num_rows // group.size())
    padded = part.new_zeros(share, *part.shape[1:])
    padded[: len(part)] = part
    whole = all_gather(padded, group)
    # No view, which a layer could not mark as its own output.
    return whole if len(whole) == num_rows else whole[:num_rows].clone()


def take_part(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The part of this rank."""
    share = -(-len(whole) // group.size())
    return whole[group.rank() * share : (group.rank() + 1) * share]


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.num_rows = group, len(tensors[0])
        return tuple(take_part(tensor, group).clone() for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gather_parts(gradient, ctx.num_rows, ctx.group) for gradient in gradients)


class _GiveAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, num_rows: int, part: Tensor) -> Tensor:
        ctx.group = group
        return gather_parts(part, num_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, take_part(gradient, ctx.group)
