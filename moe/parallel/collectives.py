"""Collectives by one name, whatever the version of torch calls them."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it, and warns about the old name.
_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks, of equal shape, one after another along the first dimension."""
    part = part.contiguous()
    whole = part.new_empty(part.shape[0] * group.size(), *part.shape[1:])
    _GATHER(whole, part, group=group)
    return whole
