"""Collectives by one name, whatever the version of torch calls them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames them, and warns about the old names.
_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, of equal shape, one after another along the first dimension."""
    part = part.contiguous()
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    _GATHER(whole, part, group=group)
    return whole


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's of the parts, summed over ranks.

    Args:
        parts: ``(ranks, ...)``, contiguous; one for each rank.
        group: the ranks.
    """
    own = torch.empty_like(parts[0])
    _REDUCE_SCATTER(own, parts.flatten(0, 1), group=group)
    return own
