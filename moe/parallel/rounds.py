"""In how many rounds an exchange goes, and which rows go in which; pure arithmetic on counts that every rank has.

Example, two ranks that have 4 and 3 rows for rank 0 (and none for rank 1), of which it takes 4 at a time: two rounds.
Rank 0 sends 2 and 2; rank 1, whose cuts are staggered by half a round, sends 2 and 1.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
@dataclass(frozen=True)
class Round:
    """One all-to-all, as one rank sees it."""

    first: list[int]
    """For each destination, which of the rows meant for it goes first."""
    sent: list[int]
    """Rows to each destination."""
    received: list[int]
    """Rows from each source."""


def count_rounds(counts: NDArray[np.int64], chunks: int, limit: int | None) -> int:
    """How many rounds there must be for no rank to receive more than ``limit`` rows in one.

    Args:
        counts: ``(G, G)``; rows from each source (row) to each destination (column).
        chunks: rounds at least.
        limit: at least G, so that a row from each source fits; None for no limit.

    Returns:
        The smallest number that is enough, or up to a sixteenth more.
    """
    rounds = chunks
    if limit is not None:
        rounds = max(rounds, int(-(-counts.sum(0).max() // limit)))
        # Ends: with as many rounds as the largest count there is at most a row from each source in any.
        while np.diff(_cuts(counts, rounds), axis=0).sum(1).max() > limit:
            rounds += 1 + rounds // 16
    return rounds


def plan_rounds(counts: NDArray[np.int64], rank: int, rounds: int) -> list[Round]:
    """Divide an exchange into rounds.

    What each source has for each destination is cut into as many nearly equal parts as there are rounds, so that every
    round keeps all ranks busy. Where the cuts fall is staggered by source, or the remainders of all would meet.

    Args:
        counts: ``(G, G)``; rows from each source (row) to each destination (column).
        rank: whose view is returned.
        rounds: how many.
    """
    cuts = _cuts(counts, rounds)
    parts = np.diff(cuts, axis=0)
    return [Round(cuts[r, rank].tolist(), parts[r, rank].tolist(), parts[r, :, rank].tolist()) for r in range(rounds)]


def _cuts(counts: NDArray[np.int64], rounds: int) -> NDArray[np.int64]:
    """``(rounds + 1, G, G)``; how many rows have gone before each round."""
    size = len(counts)
    stagger = rounds * np.arange(size)[:, None] // size
    steps = np.arange(rounds + 1)[:, None, None]
    return (counts * steps + stagger) // rounds
