"""The plan on GPUs: a counting sort in two passes over the assignments, with a scan between them.

Blocks of assignments count their experts, a scan of the counts in (expert, block) order gives the first row of each
block's share of each expert, and every block then places its own. Within a block an assignment's rank is the number
of earlier ones with the same expert: no atomics, so the order is the order of the assignments.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moe.kernels.triton_gpus import require_supported_gpu

# Ranks cost BLOCK comparisons an assignment, the counts (E + 1) * N / BLOCK integers: both small at 128.
BLOCK = 128
# Sizes that change from batch to batch and say nothing about alignment: one compilation serves all of them.
SIZES = ["num_assignments", "num_experts", "num_blocks"]


@triton.jit
@no_type_check
def _load_buckets(ids, first, num_assignments, num_experts, BLOCK: tl.constexpr):
    """A block's experts; num_experts for none, and past the end a value that no assignment has."""
    index = first + tl.arange(0, BLOCK)
    inside = index < num_assignments
    expert = tl.load(ids + index, mask=inside, other=-1)
    tl.device_assert((expert >= -1) & (expert < num_experts), "expert_ids out of range", mask=inside)
    is_expert = (expert >= 0) & (expert < num_experts)
    bucket = tl.where(is_expert, expert, num_experts)
    return index, inside, is_expert, tl.where(inside, bucket, num_experts + 1)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _count_kernel(ids, counts, num_assignments, num_experts, num_blocks, BLOCK: tl.constexpr):
    """Write how often each bucket occurs in this block; ``counts`` is zero before."""
    block = tl.program_id(0)
    _, inside, _, bucket = _load_buckets(ids, block * BLOCK, num_assignments, num_experts, BLOCK)
    position = tl.arange(0, BLOCK)
    same = bucket[:, None] == bucket[None, :]
    count = tl.sum(same.to(tl.int32), axis=1)
    later = tl.sum((same & (position[None, :] > position[:, None])).to(tl.int32), axis=1)
    # Only the last assignment of a bucket writes its count, so that no two lanes write to one place.
    tl.store(counts + bucket.to(tl.int64) * num_blocks + block, count, mask=inside & (later == 0))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def _place_kernel(ids, first_rows, assignments, rows, num_assignments, num_experts, num_blocks, BLOCK: tl.constexpr):
    """Give each assignment of this block its row: where its bucket's share begins, plus its rank in the block."""
    block = tl.program_id(0)
    index, inside, is_expert, bucket = _load_buckets(ids, block * BLOCK, num_assignments, num_experts, BLOCK)
    position = tl.arange(0, BLOCK)
    same = bucket[:, None] == bucket[None, :]
    rank = tl.sum((same & (position[None, :] < position[:, None])).to(tl.int32), axis=1)
    row = rank + tl.load(first_rows + bucket.to(tl.int64) * num_blocks + block, mask=inside, other=0)
    tl.store(assignments + row, index, mask=inside)
    tl.store(rows + index, tl.where(is_expert, row, -1), mask=inside)


def make_plan(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort assignments by expert, stably; see :func:`moe.kernels.plan.make_plan`.

    Args:
        expert_ids: ``(T, K)`` int32, contiguous, values in -1 .. num_experts - 1.
        num_experts: E.

    Returns:
        ``assignments (N,)``, ``expert_offsets (E + 1,)`` and ``rows (T, K)``, int32.
    """
    require_supported_gpu()
    total = expert_ids.numel()
    assignments = expert_ids.new_empty(total)
    rows = torch.empty_like(expert_ids)
    if total == 0:
        return assignments, expert_ids.new_zeros(num_experts + 1), rows
    num_blocks = triton.cdiv(total, BLOCK)
    counts = expert_ids.new_zeros((num_experts + 1) * num_blocks)
    wrap_triton(_count_kernel)[(num_blocks,)](expert_ids, counts, total, num_experts, num_blocks, BLOCK=BLOCK)
    first_rows = torch.cumsum(counts, dim=0, dtype=torch.int32) - counts
    wrap_triton(_place_kernel)[(num_blocks,)](
        expert_ids, first_rows, assignments, rows, total, num_experts, num_blocks, BLOCK=BLOCK
    )
    # The share of "no expert" begins where the last expert's ends. Not a slice with a step: its length would be a
    # function of the number of tokens to torch.compile, which then guards on it.
    return assignments, first_rows.view(num_experts + 1, num_blocks)[:, 0].contiguous(), rows
