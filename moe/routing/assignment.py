"""The balanced assignment of tokens to experts with the largest sum of scores, on the host.

Sizes: T tokens, E experts, K experts a token. It is a flow of least cost. It starts from prices that nearly balance it:
each token takes its K best scores less prices, which is the best assignment *for the loads that come out*. From there a
token at a time moves along the cheapest chain of exchanges from an expert with too many to one with too few; each such
step keeps the assignment the best for its loads. Scores are whole numbers here, so that no sum is rounded.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_SCALE = 2.0**48
"""The whole number of the largest score; that of the smallest is 0."""

_TIES = 2**16
"""Equal scores are told apart by less than this: tokens that are all alike would need an exchange each."""

_NONE = 2**60
"""The cost of what is impossible: above every sum of E scores, and two of it are still a number."""

_SWEEPS = 30
"""Of prices: enough to leave few exchanges, which cost more."""

_FAR = 2**12
"""How far a score may be from its token's median, over how far the largest of a usual token is."""


def balanced_assignment(scores: NDArray[np.floating], top_k: int) -> NDArray[np.int32]:
    """K distinct experts for each token such that loads differ by at most one and the sum of the scores is the largest.

    The sum is less than the largest possible by at most ``T * K * 2^-31`` times the largest range of a token's scores:
    scores nearer to each other than that are told apart by a fixed pattern.

    Args:
        scores: ``(T, E)``. What is not finite counts as the nearest finite float32, NaN as the largest. A score that is
            thousands of times as far from the median of its token as is usual counts as less far, so that one that has
            run away leaves the others apart.
        top_k: K, at most E.

    Returns:
        ``(T, K)``, each token's experts by falling score, of equals the lower id first. The same on every run.
    """
    whole = _whole_numbers(scores)
    has = _best(whole - _prices(whole, top_k), top_k)
    if scores.size > 0 and top_k < scores.shape[1]:
        has = _balance(whole, has, top_k)
    keys = np.where(has, -(whole // _TIES), 1)
    return np.argsort(keys, axis=1, kind="stable")[:, :top_k].astype(np.int32)


def _whole_numbers(scores: NDArray[np.floating]) -> Ints:
    largest, tiny = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
    scores = np.nan_to_num(scores.astype(np.float64), nan=largest, posinf=largest, neginf=-largest)
    # The best assignment stays the best if a token's scores are all raised alike.
    scores -= np.median(scores, axis=1, keepdims=True)
    reach = np.abs(scores).max(1)
    if (reach > 0).any():
        far = _FAR * np.median(reach[reach > 0])
        scores = scores.clip(-far, far)
    lowest, highest = scores.min(initial=largest), scores.max(initial=-largest)
    units = (scores - lowest) / max(highest - lowest, tiny) * _SCALE
    ties = np.random.default_rng(0).integers(0, _TIES, scores.shape)
    whole: Ints = units.astype(np.int64) // _TIES * _TIES + ties
    return whole


def _best(values: Ints, top_k: int) -> NDArray[np.bool_]:
    """A table of each row's K largest values, of equals the first."""
    order = np.argsort(-values, axis=1, kind="stable")
    has = np.zeros(values.shape, bool)
    np.put_along_axis(has, order[:, :top_k], True, axis=1)
    return has


def _prices(scores: Ints, top_k: int) -> Ints:
    """``(E,)``: what to subtract from an expert's scores so that about ``T * K / E`` tokens have it among their best.

    In turn each token's bar lies between its K-th and next best expert, and each expert's price between the margins
    over the bar of the last token that has room and the first that has not.
    """
    num_tokens, num_experts = scores.shape
    room = num_tokens * top_k // num_experts
    prices = np.zeros(num_experts, np.int64)
    if top_k == num_experts or not 0 < room < num_tokens:
        return prices
    for _ in range(_SWEEPS):
        bar = _between(scores - prices, top_k)
        prices = _between((scores - bar[:, None]).T, room)
    return prices


def _between(rows: Ints, k: int) -> Ints:
    """The middle between each row's k-th and (k + 1)-th largest value."""
    split = rows.shape[1] - k
    parts = np.partition(rows, (split - 1, split), axis=1)
    middle: Ints = (parts[:, split - 1] + parts[:, split]) // 2
    return middle


def _balance(scores: Ints, has: NDArray[np.bool_], top_k: int) -> NDArray[np.bool_]:
    """``has`` after exchanges: each load is the share, rounded down or up, and no exchange is a gain."""
    num_tokens, num_experts = scores.shape
    low, rest = divmod(num_tokens * top_k, num_experts)
    high = low + (rest > 0)
    scores, has = scores.T.copy(), has.T.copy()  # what follows reads them expert by expert
    experts = np.arange(num_experts)
    cost = np.stack([_exchange_costs(scores, has, e, experts) for e in range(num_experts)])
    load = has.sum(1)
    while True:
        sources, targets = load > low, load < high
        if is_uneven := bool((load > high).any() or (load < low).any()):
            sources = load > high if (load > high).any() else sources
            targets = load < low if (load < low).any() else targets
        chain, total = _cheapest_chain(cost, sources, targets)
        if not is_uneven and total >= 0:
            return has.T
        moves = [(_exchange(scores, has, source, target), source, target) for source, target in pairwise(chain)]
        load[chain[0]] -= 1
        load[chain[-1]] += 1
        for move in moves:
            _correct_costs(cost, scores, has, *move)


def _exchange_costs(scores: Ints, has: NDArray[np.bool_], source: int, targets: Ints) -> Ints:
    """What is lost if an expert gives the token that loses least by it to each of others; both tables ``(E, T)``."""
    own = np.nonzero(has[source])[0]
    others = np.ix_(targets, own)
    losses = np.where(has[others], _NONE, scores[source, own] - scores[others])
    least: Ints = losses.min(1, initial=_NONE)
    return least


def _exchange(scores: Ints, has: NDArray[np.bool_], source: int, target: int) -> int:
    """Give the token that loses least by it from one expert to another; returns which."""
    can = np.nonzero(has[source] & ~has[target])[0]
    token = int(can[(scores[source, can] - scores[target, can]).argmin()])
    has[source, token], has[target, token] = False, True
    return token


def _correct_costs(cost: Ints, scores: Ints, has: NDArray[np.bool_], token: int, source: int, target: int) -> None:
    """Bring the costs up to date after an exchange, and exactly so.

    What the token has can now go where it was: that can only lower a cost. Where it was it cannot go from, and where it
    is it cannot go to: that can only raise a cost that was its own.
    """
    row, own = scores[:, token], np.nonzero(has[:, token])[0]
    cost[own] = np.minimum(cost[own], np.where(has[:, token], _NONE, row[own, None] - row))
    stale = np.nonzero(cost[source] == row[source] - row)[0]
    cost[source, stale] = _exchange_costs(scores, has, source, stale)
    for e in own[cost[own, target] == row[own] - row[target]].tolist():
        cost[e, target] = _exchange_costs(scores, has, e, np.array([target]))[0]


def _cheapest_chain(cost: Ints, sources: NDArray[np.bool_], targets: NDArray[np.bool_]) -> tuple[list[int], int]:
    """The experts along the cheapest path from a source to a target, and what it costs; a source alone costs nothing.

    Bellman and Ford's search: a cost may be negative, but none of a ring is.
    """
    experts = np.arange(len(cost))
    distance = np.where(sources, 0, _NONE)
    previous = np.full(len(cost), -1)
    for _ in experts:
        through = np.minimum(distance[:, None] + cost, _NONE)
        nearest = through.argmin(0)
        best = through[nearest, experts]
        shorter = best < distance
        if not shorter.any():
            break
        distance = np.where(shorter, best, distance)
        previous = np.where(shorter, nearest, previous)
    chain = [int(np.where(targets, distance, _NONE).argmin())]
    while previous[chain[0]] >= 0:
        chain.insert(0, int(previous[chain[0]]))
    return chain, int(distance[chain[-1]])
