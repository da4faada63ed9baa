"""A shuffled order of any length in constant memory."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A keyed bijection on ``0 .. size - 1``.

    A number ``x < a * b``, with a and b about the root of ``size``, is a pair ``(x // b, x % b)``. Each round adds to
    one half, modulo its range, a hash of the other half, which can be undone, so the rounds are a bijection on
    ``a * b`` numbers (a Feistel network). Results outside ``size`` are put in again until they fall inside; the
    orbit of a number inside comes back inside, so this ends and stays a bijection (cycle walking).

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """

    size: int
    """How many numbers, at least 1."""

    seed: int
    """Any integer; another seed is another order."""

    epoch: int = 0
    """Likewise."""

    def __call__(self, positions: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """Where each position is sent.

        Args:
            positions: ``(N,)`` int64, in ``0 .. size - 1``.

        Returns:
            ``(N,)`` int64, in the same range; different for different positions.
        """
        numbers = self._rounds(positions.astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._rounds(numbers[outside])
        return numbers.astype(np.int64)

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        """The bijection on ``a * b`` numbers."""
        rows = math.isqrt(self.size - 1) + 1
        a, b = np.uint64(rows), np.uint64(-(-self.size // rows))
        left: np.ndarray = numbers // b
        right: np.ndarray = numbers % b
        for index, key in enumerate(draw(ROUNDS, self.seed, self.epoch, "order")):
            if index % 2 == 0:
                left = (left + _mix(right + key) % a) % a
            else:
                right = (right + _mix(left + key) % b) % b
        return left * b + right


def draw(count: int, *key: object) -> np.ndarray:
    """Random 64-bit numbers that depend on nothing but the key.

    Args:
        count: how many, at most 8.
        *key: what to draw for; written out as text, so any integers and strings.

    Returns:
        ``(count,)`` uint64.
    """
    return np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * count).digest(), dtype="<u8")


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers, each by itself; products wrap.

    Source: the finalizer of SplitMix64, Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014.
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
