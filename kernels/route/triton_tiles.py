"""Steps of the routing kernels on a tile of tokens and experts.

The largest values are found by integers in the order of the floats: there NaN has a place (the last), and a key that
has been taken can be set below every other.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

_TAKEN = tl.constexpr(-(2**31))  # below the key of every float
_NAN_KEY = tl.constexpr(2**31 - 1)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
@no_type_check
def _keys_of(values):
    """Integers that compare as the floats do, -0 equal to 0, NaN above all."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values != values, _NAN_KEY, keys)


@triton.jit
@no_type_check
def _values_of(keys):
    """The floats of keys; some NaN for that of NaN."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _take_one(keys, position):
    """The place of each row's largest key, the first of equals, and the keys without it."""
    best = tl.argmax(keys, axis=1, tie_break_left=True)
    return best, tl.where(position[None, :] == best[:, None], _TAKEN, keys)


@triton.jit
@no_type_check
def take_best(keys, position, K: tl.constexpr, CHOICES: tl.constexpr):
    """The places of each row's K largest keys, largest first, in a tile of CHOICES columns."""
    choice = tl.arange(0, CHOICES)
    places = tl.full((keys.shape[0], CHOICES), 0, tl.int32)
    for k in range(K):
        best, keys = _take_one(keys, position)
        places = tl.where(choice[None, :] == k, best[:, None], places)
    return places


@triton.jit
@no_type_check
def expert_at(place, NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, MEMBERS: tl.constexpr):
    """The expert at a place of a tile whose groups are padded to MEMBERS, and whether there is one."""
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    if NUM_GROUPS == 1:
        return place, place < NUM_EXPERTS
    else:  # noqa: RET505 (Triton compiles both branches where the first returns)
        exists = (place // MEMBERS < NUM_GROUPS) & (place % MEMBERS < size)
        return place // MEMBERS * size + place % MEMBERS, exists


@triton.jit
@no_type_check
def _log1p(x):
    """``log(1 + x)`` of 0 <= x <= 1 to float32 precision, however small x: a GPU's logarithm loses that near 1."""
    z = x / (2 + x)  # log(1 + x) = 2 artanh(z), whose series in z^2 <= 1/9 has no term that cancels another
    square = z * z
    series = 1.0 / 13
    for i in tl.static_range(6):
        series = series * square + 1.0 / (11 - 2 * i)
    return 2 * z * series


@triton.jit
@no_type_check
def score_of(values, largest, total, SCORE_FUNCTION: tl.constexpr):
    """Scores of logits; softmax by the largest logit of the token and its sum of ``exp(logit - largest)``."""
    if SCORE_FUNCTION == "softmax":
        score = tl.exp(values - largest) / total
    elif SCORE_FUNCTION == "sigmoid":
        score = tl.sigmoid(values)
    else:
        tl.static_assert(SCORE_FUNCTION == "sqrt_softplus", "a score function without a formula here")
        score = tl.sqrt(_log1p(tl.exp(-tl.abs(values))) + tl.maximum(values, 0.0))  # the first term keeps NaN
    return score


@triton.jit
@no_type_check
def grad_through_scores(terms, score, SCORE_FUNCTION: tl.constexpr):
    """The gradient of the logits, from that of the scores times the scores."""
    if SCORE_FUNCTION == "softmax":
        terms -= score * tl.sum(terms, axis=1)[:, None]
    elif SCORE_FUNCTION == "sigmoid":
        terms *= 1 - score
    else:
        tl.static_assert(SCORE_FUNCTION == "sqrt_softplus", "a score function without a gradient here")
        # (1 - exp(-x)) / (2 x) at x = score^2; where the difference would cancel by the series 1 - x/2 (1 - x/3 (...)),
        # without its terms from x^8 / 9! < 2^-26 on.
        square = score * score
        series = tl.full(score.shape, 1.0, tl.float32)
        for i in tl.static_range(7):
            series = 1.0 - series * square * (1.0 / (8 - i))
        terms *= 0.5 * tl.where(square < 0.5, series, (1 - tl.exp(-square)) / square)
    return terms


@triton.jit
@no_type_check
def chosen_scores(logits, ids, is_choice, largest, total, SCORE_FUNCTION: tl.constexpr):
    """Scores of chosen experts, 0 for none; from their logits once more (in the cache): a tile cannot be indexed."""
    owned = is_choice & (ids >= 0)
    return tl.where(owned, score_of(tl.load(logits + ids, mask=owned, other=0.0), largest, total, SCORE_FUNCTION), 0.0)


@triton.jit
@no_type_check
def _keep_best_groups(
    keys, biased_keys, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr
):
    """The keys of experts in each token's best groups; those of the others become ``_TAKEN``."""
    BLOCK_TOKENS: tl.constexpr = keys.shape[0]
    member_keys = tl.reshape(biased_keys, (BLOCK_TOKENS * GROUPS, MEMBERS))
    _first, rest = _take_one(member_keys, tl.arange(0, MEMBERS))
    score = _values_of(tl.max(member_keys, axis=1))
    second = tl.max(rest, axis=1)
    score = tl.where(second == _TAKEN, score, score + _values_of(second))  # a group of one expert has no second
    group = tl.arange(0, GROUPS)
    group_keys = tl.reshape(_keys_of(score), (BLOCK_TOKENS, GROUPS))
    group_keys = tl.where(group[None, :] < NUM_GROUPS, group_keys, _TAKEN)
    for _ in range(TOP_GROUPS):
        _best, group_keys = _take_one(group_keys, group)
    kept = (group_keys == _TAKEN) & (group[None, :] < NUM_GROUPS)
    kept = tl.broadcast_to(kept[:, :, None], (BLOCK_TOKENS, GROUPS, MEMBERS))
    return tl.where(tl.reshape(kept, (BLOCK_TOKENS, GROUPS * MEMBERS)), keys, _TAKEN)


@triton.jit
@no_type_check
def selection_keys(
    values,
    score,
    biases,
    exists,
    HAS_BIAS: tl.constexpr,
    BY_SCORE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """What experts are compared by; ``_TAKEN`` for those that cannot be chosen."""
    biased = score
    if HAS_BIAS:
        biased += tl.load(biases, mask=exists, other=0.0)[None, :]
    biased_keys = tl.where(exists[None, :], _keys_of(biased), _TAKEN)
    keys = biased_keys
    if not (HAS_BIAS or BY_SCORE):
        keys = tl.where(exists[None, :], _keys_of(values), _TAKEN)
    if NUM_GROUPS > 1:
        keys = _keep_best_groups(keys, biased_keys, NUM_GROUPS, TOP_GROUPS, GROUPS, MEMBERS)
    return keys


@triton.jit
@no_type_check
def normalized(share, NORMALIZE: tl.constexpr):
    """A token's chosen scores over their sum, and that sum; the floor is the smallest normal number."""
    total = tl.sum(share, axis=1)[:, None]
    if NORMALIZE:
        share = share / tl.where(total < TINY, TINY, total)  # not maximum, which drops NaN
    return share, total
