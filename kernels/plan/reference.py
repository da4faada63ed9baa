"""The plan in PyTorch and NumPy: the definition, and the path of the CPU."""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moe.errors import ConfigError, ShapeError


def make_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort assignments by expert, stably; see :func:`moe.kernels.plan.make_plan`.

    Args:
        expert_ids: ``(T, K)`` int32, values in -1 .. num_experts - 1.
        num_experts: E.

    Returns:
        ``assignments (N,)``, ``expert_offsets (E + 1,)`` and ``rows (T, K)``, int32.

    Raises:
        ConfigError: an id is out of range.
    """
    ids = expert_ids.reshape(-1)
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < -1 or high >= num_experts:
            raise ConfigError(
                f"expert_ids has values {low} .. {high}, must be -1 .. num_experts - 1 = {num_experts - 1}"
            )
    is_none = ids < 0
    bucket = ids.masked_fill(is_none, num_experts)  # sorts behind every expert
    # NumPy's stable sort of 16-bit integers is a radix sort, about ten times as fast as torch.sort here.
    key = bucket.to(torch.int16 if num_experts <= np.iinfo(np.int16).max else torch.int32)
    order = torch.from_numpy(np.argsort(key.numpy(), kind="stable"))
    counts = torch.bincount(bucket, minlength=num_experts + 1)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32)
    torch.cumsum(counts[:-1], dim=0, out=expert_offsets[1:])
    rows = torch.empty_like(ids)
    rows[order] = torch.arange(ids.numel(), dtype=torch.int32)
    return order.int(), expert_offsets, rows.masked_fill_(is_none, -1).view_as(expert_ids)


def checked_offsets(expert_offsets: Tensor, num_rows: int) -> list[int]:
    """Read the offsets of a plan.

    Args:
        expert_offsets: ``(E + 1,)`` int32, on the CPU.
        num_rows: N.

    Raises:
        ShapeError: they do not ascend from 0 to at most N.
    """
    offsets: list[int] = expert_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] > num_rows or any(end < start for start, end in pairwise(offsets)):
        raise ShapeError(f"expert_offsets={offsets} must start at 0 and ascend to at most {num_rows}, the rows")
    return offsets
