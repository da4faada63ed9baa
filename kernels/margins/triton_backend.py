"""The margins' histogram on GPUs: a program holds some tokens' scores and adds a one to a bin for each.

Atomics, which no other kernel here has, are harmless here: they add integers, whose sum is the same in any order.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moe.kernels.margins import bins
from moe.kernels.triton_gpus import require_supported_gpu

TILE = 2048  # scores that a program holds, of as many tokens as fit
MAX_BLOCK_TOKENS = 64
_SHIFT, _FIRST = tl.constexpr(bins.SHIFT), tl.constexpr(bins.FIRST)
_SIDE, _BINS = tl.constexpr(bins.SIDE), tl.constexpr(bins.BINS)


@triton.jit
@no_type_check
def _bin_of(margins):
    """``bin_of`` of margins that are not -0."""
    bits = margins.to(tl.int32, bitcast=True)
    size = ((bits & 0x7FFFFFFF) >> _SHIFT) - _FIRST
    return _SIDE + (tl.minimum(tl.maximum(size, 0), _SIDE - 1) ^ (bits >> 31))


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def _count_kernel(
    scores,
    expert_ids,
    score_bias,
    token_mask,
    counts,
    num_tokens,
    HAS_MASK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Add the margins of a block of tokens to ``counts``; the reference says which tokens count."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = token < num_tokens
    expert = tl.arange(0, BLOCK_EXPERTS)
    exists = expert < NUM_EXPERTS
    valid = inside[:, None] & exists[None, :]
    place = token.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
    biased = tl.load(scores + place, mask=valid, other=float("-inf"))
    biased += tl.load(score_bias + expert, mask=exists, other=0.0)[None, :]
    chosen = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.int1)
    for k in range(TOP_K):
        expert_id = tl.load(expert_ids + token.to(tl.int64) * TOP_K + k, mask=inside, other=-1)
        tl.device_assert((expert_id >= -1) & (expert_id < NUM_EXPERTS), "expert_ids out of range", mask=inside)
        chosen |= expert[None, :] == expert_id[:, None]
    best = tl.max(tl.where(chosen, float("-inf"), biased), axis=1)
    worst = tl.min(tl.where(chosen, biased, float("inf")), axis=1)
    best = tl.where(best == 0.0, 0.0, best)  # not -0, and then no margin is
    worst = tl.where(worst == 0.0, 0.0, worst)
    counted = inside & (tl.abs(best) < float("inf")) & (tl.abs(worst) < float("inf"))
    counted &= tl.max((biased != biased).to(tl.int32), axis=1) == 0
    if HAS_MASK:
        counted &= tl.load(token_mask + token, mask=inside, other=0) != 0
    target = counts + expert[None, :] * _BINS + _bin_of(tl.where(chosen, best[:, None], worst[:, None]) - biased)
    tl.atomic_add(target, 1, mask=valid & counted[:, None], sem="relaxed")


def count_margins(scores: Tensor, expert_ids: Tensor, score_bias: Tensor, token_mask: Tensor | None) -> Tensor:
    """Count the margins of each expert in bins, of contiguous tensors; see :func:`moe.kernels.margins.count_margins`.

    Returns:
        ``(E, BINS)`` int32.
    """
    require_supported_gpu()
    num_tokens, num_experts = scores.shape
    counts = scores.new_zeros(num_experts, bins.BINS, dtype=torch.int32)
    if num_tokens == 0:
        return counts
    columns = triton.next_power_of_2(num_experts)
    block_tokens = max(1, min(MAX_BLOCK_TOKENS, TILE // columns))
    wrap_triton(_count_kernel)[(triton.cdiv(num_tokens, block_tokens),)](
        scores,
        expert_ids,
        score_bias,
        scores if token_mask is None else token_mask,  # a pointer is needed, and not read without a mask
        counts,
        num_tokens,
        HAS_MASK=token_mask is not None,
        NUM_EXPERTS=num_experts,
        TOP_K=expert_ids.shape[1],
        BLOCK_TOKENS=block_tokens,
        BLOCK_EXPERTS=columns,
    )
    return counts
