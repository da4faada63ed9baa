"""Collectives of tensor and sequence parallelism, each with the one that its gradient needs.

Activations ``(B, S, D)`` come in three kinds: *whole*, the same on every rank of the group; a *part*, of which rank r
has tokens ``r * ceil(S / ranks)`` and on of every sequence, the last ranks fewer or none; and *partial*, whose sum over
ranks is meant. What reads a whole activation is either *alike*, the same product on every rank, whose gradient is whole
again; or *divided*, other heads or hidden units on each rank, whose gradients are partial.

Source: Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2 (the pairs); Shoeybi et al. 2019, arXiv 1909.08053,
section 3 (the two on whole activations).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moe.errors import ShapeError
from moe.parallel.collectives import all_gather, reduce_scatter


def cut_sequence(whole: Float[Tensor, "B S D"], group: dist.ProcessGroup) -> Float[Tensor, "B part D"]:
    """The part of this rank; the gradient is gathered."""
    return _paired(partial(take_part, group=group), partial(gather_parts, length=whole.shape[1], group=group), whole)


def join_alike(part: Float[Tensor, "B part D"], length: int, group: dist.ProcessGroup) -> Float[Tensor, "B S D"]:
    """The whole, for what every rank computes alike: the gradient is whole already, and its part is taken.

    Raises:
        ShapeError: the part is not this rank's of ``length`` tokens.
    """
    _check(part, length, group)
    return _paired(partial(gather_parts, length=length, group=group), partial(take_part, group=group), part)


def join_divided(part: Float[Tensor, "B part D"], length: int, group: dist.ProcessGroup) -> Float[Tensor, "B S D"]:
    """The whole, for what is divided over ranks: the gradient is partial, and its sum is scattered.

    Raises:
        ShapeError: the part is not this rank's of ``length`` tokens.
    """
    _check(part, length, group)
    return _paired(partial(gather_parts, length=length, group=group), partial(_reduce_scatter, group=group), part)


def sum_to_part(partials: Float[Tensor, "B S D"], group: dist.ProcessGroup) -> Float[Tensor, "B part D"]:
    """The part of this rank of the sum; the gradient is gathered."""
    back = partial(gather_parts, length=partials.shape[1], group=group)
    return _paired(partial(_reduce_scatter, group=group), back, partials)


def sum_to_whole(partials: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum on every rank, of any shape; the gradient is whole already."""
    return _paired(partial(_all_reduce, group=group), _same, partials)


def use_divided(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor itself, of any shape, for what is divided over ranks: the gradient is partial, and summed."""
    return _paired(_same, partial(_all_reduce, group=group), whole)


def _check(part: Tensor, length: int, group: dist.ProcessGroup) -> None:
    share = _share(length, group)
    expected = min(max(length - group.rank() * share, 0), share)
    if part.shape[1] != expected:
        raise ShapeError(
            f"activations {tuple(part.shape)} are not this rank's part of sequences of {length} tokens, which has "
            f"{expected}: blocks of one list must be called one after another, each once, the first and the last too"
        )


def _share(length: int, group: dist.ProcessGroup) -> int:
    return -(-length // group.size())


def take_part(whole: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a whole ``(B, S, ...)``, a tensor of its own."""
    share = _share(whole.shape[1], group)
    # A copy: a view would keep the whole in memory for as long as the part is needed.
    return whole[:, group.rank() * share : (group.rank() + 1) * share].clone()


def gather_parts(part: Tensor, *, length: int, group: dist.ProcessGroup) -> Tensor:
    """The whole ``(B, length, ...)`` of all ranks' parts."""
    share = _share(length, group)
    parts = all_gather(_pad(part, share)[None], group).unbind()
    return torch.cat([each[:, : max(length - rank * share, 0)] for rank, each in enumerate(parts)], 1)


def _reduce_scatter(partials: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    length, share = partials.shape[1], _share(partials.shape[1], group)
    by_rank = _pad(partials, group.size() * share).unflatten(1, (group.size(), share)).transpose(0, 1).contiguous()
    part = reduce_scatter(by_rank, group)
    own = max(length - group.rank() * share, 0)
    return part if own >= share else part[:, :own].clone()


def _pad(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, missing)) if missing else tensor


def _all_reduce(partials: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    total = partials.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _same(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _paired(there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    result: Tensor = _Paired.apply(there, back, tensor)
    return result


class _Paired(torch.autograd.Function):
    """One function forward, another on the gradient."""

    @staticmethod
    def forward(
        ctx: Any, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], tensor: Tensor
    ) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.back(gradient)
