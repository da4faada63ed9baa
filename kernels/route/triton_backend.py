"""Routing on GPUs: one pass over a token's logits for scores, selection and weights, one for their gradient.

A tile holds some tokens and all experts. Selection takes the largest key K times. With groups, the experts of each are
padded to a power of two, so that a tile folds into (tokens, groups, members).
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from moe.kernels.route.triton_tiles import (
    TINY,
    chosen_scores,
    expert_at,
    grad_through_scores,
    normalized,
    score_of,
    selection_keys,
    take_best,
)

TILE = 2048  # logits that a program holds, of as many tokens as fit, whatever their number
MAX_BLOCK_TOKENS = 64


@triton.jit(do_not_specialize=["num_tokens", "scale"])
@no_type_check
def _route_kernel(
    logits,
    score_bias,
    token_mask,
    expert_ids,
    weights,
    scores,
    num_tokens,
    scale,
    SELECT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BY_SCORE: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Write scores, ids (where SELECT; they are given where not) and weights of a block of tokens."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = token < num_tokens
    place = tl.arange(0, GROUPS * MEMBERS)
    expert, exists = expert_at(place, NUM_EXPERTS, NUM_GROUPS, MEMBERS)
    row = token.to(tl.int64)[:, None] * NUM_EXPERTS
    valid = inside[:, None] & exists[None, :]
    values = tl.load(logits + row + expert[None, :], mask=valid, other=float("-inf"))
    largest = tl.max(values, axis=1)[:, None]
    total = tl.sum(tl.exp(values - largest), axis=1)[:, None]
    score = score_of(values, largest, total, SCORE_FUNCTION)
    tl.store(scores + row + expert[None, :], score, mask=valid)
    choice = tl.arange(0, CHOICES)
    chosen_at = token.to(tl.int64)[:, None] * TOP_K + choice[None, :]
    is_choice = inside[:, None] & (choice < TOP_K)[None, :]
    if SELECT:
        keys = selection_keys(
            values, score, score_bias + expert, exists, HAS_BIAS, BY_SCORE, NUM_GROUPS, TOP_GROUPS, GROUPS, MEMBERS
        )
        ids, _exists = expert_at(take_best(keys, place, TOP_K, CHOICES), NUM_EXPERTS, NUM_GROUPS, MEMBERS)
        if HAS_MASK:
            ids = tl.where((tl.load(token_mask + token, mask=inside, other=0) != 0)[:, None], ids, -1)
        tl.store(expert_ids + chosen_at, ids, mask=is_choice)
    else:
        ids = tl.load(expert_ids + chosen_at, mask=is_choice, other=-1)
    share, _total = normalized(chosen_scores(logits + row, ids, is_choice, largest, total, SCORE_FUNCTION), NORMALIZE)
    tl.store(weights + chosen_at, share * scale, mask=is_choice)


@triton.jit(do_not_specialize=["num_tokens", "scale"])
@no_type_check
def _route_backward_kernel(
    grad_weights,
    grad_scores,
    scores,
    expert_ids,
    grad_logits,
    num_tokens,
    scale,
    HAS_GRAD_WEIGHTS: tl.constexpr,
    HAS_GRAD_SCORES: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """Write the gradient of the logits of a block of tokens; the reference explains the order of its products."""
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = token < num_tokens
    expert = tl.arange(0, BLOCK_EXPERTS)
    row = token.to(tl.int64)[:, None] * NUM_EXPERTS
    valid = inside[:, None] & (expert < NUM_EXPERTS)[None, :]
    score = tl.load(scores + row + expert[None, :], mask=valid, other=0.0)
    terms = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    if HAS_GRAD_SCORES:
        terms = score * tl.load(grad_scores + row + expert[None, :], mask=valid, other=0.0)
    if HAS_GRAD_WEIGHTS:
        choice = tl.arange(0, CHOICES)
        chosen_at = token.to(tl.int64)[:, None] * TOP_K + choice[None, :]
        is_choice = inside[:, None] & (choice < TOP_K)[None, :]
        ids = tl.load(expert_ids + chosen_at, mask=is_choice, other=-1)
        owned = ids >= 0
        grad = tl.load(grad_weights + chosen_at, mask=owned, other=0.0)
        share, total = normalized(tl.load(scores + row + ids, mask=owned, other=0.0), NORMALIZE)
        if NORMALIZE:
            mean = tl.sum(share * grad, axis=1)[:, None]
            grad -= tl.where(total < TINY, 0.0, mean)
        chosen_terms = scale * share * grad
        for k in range(TOP_K):
            is_k = choice[None, :] == k
            best = tl.sum(tl.where(is_k, ids, 0), axis=1)
            term = tl.sum(tl.where(is_k, chosen_terms, 0.0), axis=1)
            terms += tl.where(expert[None, :] == best[:, None], term[:, None], 0.0)
    terms = grad_through_scores(terms, score, SCORE_FUNCTION)
    tl.store(grad_logits + row + expert[None, :], terms, mask=valid)


def _block_tokens(columns: int) -> int:
    return max(1, min(MAX_BLOCK_TOKENS, TILE // columns))


def _launch(
    logits: Tensor,
    expert_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
    *,
    select: bool = False,
    score_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    by_score: bool = False,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return weights and scores; write ``expert_ids`` where they are to be selected."""
    num_tokens, num_experts = logits.shape
    weights, scores = logits.new_empty(expert_ids.shape), torch.empty_like(logits)
    if num_tokens == 0:
        return weights, scores
    top_k = expert_ids.shape[1]
    groups = triton.next_power_of_2(num_groups)
    members = triton.next_power_of_2(num_experts // num_groups)
    block_tokens = _block_tokens(groups * members)
    wrap_triton(_route_kernel)[(triton.cdiv(num_tokens, block_tokens),)](
        logits,
        logits if score_bias is None else score_bias,  # a pointer is needed, and not read without a bias
        logits if token_mask is None else token_mask,
        expert_ids,
        weights,
        scores,
        num_tokens,
        scale,
        SELECT=select,
        HAS_BIAS=score_bias is not None,
        HAS_MASK=token_mask is not None,
        BY_SCORE=by_score,
        SCORE_FUNCTION=score_function,
        NORMALIZE=normalize,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        NUM_GROUPS=num_groups,
        TOP_GROUPS=top_groups,
        BLOCK_TOKENS=block_tokens,
        GROUPS=groups,
        MEMBERS=members,
        CHOICES=triton.next_power_of_2(top_k),
    )
    return weights, scores


def route(
    logits: Tensor,
    score_bias: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
    top_k: int,
    score_function: str,
    by_score: bool,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, selection (unless ids are given) and weights of contiguous float32 logits; see the reference.

    Returns:
        ``expert_ids (T, K)`` int32, ``weights (T, K)`` and ``scores (T, E)``.
    """
    shape = logits.shape[0], top_k
    expert_ids = logits.new_empty(shape, dtype=torch.int32) if given is None else given.clone()
    weights, scores = _launch(
        logits,
        expert_ids,
        score_function,
        normalize,
        scale,
        select=given is None,
        score_bias=score_bias,
        token_mask=token_mask,
        by_score=by_score,
        num_groups=num_groups,
        top_groups=top_groups,
    )
    return expert_ids, weights, scores


def route_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    expert_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, of contiguous tensors; see the reference.

    Returns:
        ``(T, E)`` float32.
    """
    num_tokens, num_experts = scores.shape
    grad_logits = torch.empty_like(scores)
    if num_tokens == 0:
        return grad_logits
    columns = triton.next_power_of_2(num_experts)
    block_tokens = _block_tokens(columns)
    wrap_triton(_route_backward_kernel)[(triton.cdiv(num_tokens, block_tokens),)](
        scores if grad_weights is None else grad_weights,  # a pointer is needed, and not read without a gradient
        scores if grad_scores is None else grad_scores,
        scores,
        expert_ids,
        grad_logits,
        num_tokens,
        scale,
        HAS_GRAD_WEIGHTS=grad_weights is not None,
        HAS_GRAD_SCORES=grad_scores is not None,
        SCORE_FUNCTION=score_function,
        NORMALIZE=normalize,
        NUM_EXPERTS=num_experts,
        TOP_K=expert_ids.shape[1],
        BLOCK_TOKENS=block_tokens,
        BLOCK_EXPERTS=columns,
        CHOICES=triton.next_power_of_2(expert_ids.shape[1]),
    )
    return grad_logits
