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
from moe.parallel.sequence import gather_parts, join_alike, take_part
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
        part, weights = _TakePart.apply(self.group, x, routing.weights)
        expert_ids = take_part(routing.expert_ids[None], group=self.group)[0]
        nothing = weights.new_empty(len(weights), 0)  # scores and logits stay with the router
        y = self.inner.run(experts, part, Routing(expert_ids, weights, nothing, nothing))
        return join_alike(y[None], len(x), self.group)[0]


class _TakePart(torch.autograd.Function):
    """Parts of several tensors, whose gradients are gathered one after another, in the same order on all ranks."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.num_rows = group, len(tensors[0])
        return tuple(take_part(tensor[None], group=group)[0] for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wholes = (gather_parts(gradient[None], length=ctx.num_rows, group=ctx.group) for gradient in gradients)
        return None, *(whole[0] for whole in wholes)
