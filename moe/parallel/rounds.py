"""In how many rounds an exchange goes, and which rows go in which; pure arithmetic on counts that every rank has."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from moe.errors import ConfigError


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


def plan_rounds(counts: NDArray[np.int64], rank: int, chunks: int, limit: int | None) -> list[Round]:
    """Divide an exchange into rounds in which no rank receives more than ``limit`` rows.

    What each source has for each destination is cut into as many nearly equal parts as there are rounds, so that every
    round keeps all ranks busy. Where the cuts fall is staggered by source, or the remainders of all would meet.

    Args:
        counts: ``(G, G)``; rows from each source (row) to each destination (column).
        rank: whose view is returned.
        chunks: rounds at least.
        limit: rows that a rank receives in one round at most; None for no limit.

    Returns:
        As few rounds as fit, the same number on every rank, and at least one.

    Raises:
        ConfigError: a limit below G, so that one row from each source might not fit.
    """
    size = len(counts)
    if limit is not None and limit < size:
        raise ConfigError(f"max_received_tokens={limit} must be at least {size}, a row from each rank of the exchange")
    rounds = max(1, chunks)
    if limit is not None:
        rounds = max(rounds, int(-(-counts.sum(0).max() // limit)))
        while _most_received(counts, rounds) > limit:
            rounds += 1 + rounds // 16
    cuts = _cuts(counts, rounds)
    parts = np.diff(cuts, axis=0)
    return [Round(cuts[r, rank].tolist(), parts[r, rank].tolist(), parts[r, :, rank].tolist()) for r in range(rounds)]


def _cuts(counts: NDArray[np.int64], rounds: int) -> NDArray[np.int64]:
    """``(rounds + 1, G, G)``; how many rows have gone before each round."""
    size = len(counts)
    stagger = rounds * np.arange(size)[:, None] // size
    steps = np.arange(rounds + 1)[:, None, None]
    return (counts * steps + stagger) // rounds


def _most_received(counts: NDArray[np.int64], rounds: int) -> int:
    return int(np.diff(_cuts(counts, rounds), axis=0).sum(1).max())
