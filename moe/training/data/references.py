"""What simple compressors reach on the same text, to set a model's bits per byte beside."""

import math
import zlib

import numpy as np
from jaxtyping import Int

NUM_BYTES = 256


def count_bytes(text: bytes) -> Int[np.ndarray, " 256"]:
    """``(256,)`` int64, how often each byte occurs."""
    return np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=NUM_BYTES)


def unigram_bits_per_byte(train: Int[np.ndarray, " 256"], val: Int[np.ndarray, " 256"]) -> float:
    """Bits per byte of validation text under the byte frequencies of the training text.

    Each count is one higher than observed (Laplace), so that a byte that training lacks costs finitely many bits.

    Args:
        train: ``(256,)`` how often each byte occurs in the training text.
        val: ``(256,)`` likewise in the validation text, which is not empty.

    Returns:
        Bits per byte.
    """
    bits = math.log2(train.sum() + NUM_BYTES) - np.log2(train + 1)
    return float(val @ bits / val.sum())


class GzipMeter:
    """Measures what ``gzip -9`` makes of a text, header and checksum included, without keeping any of it."""

    def __init__(self) -> None:
        self._compressor = zlib.compressobj(level=9, wbits=16 + zlib.MAX_WBITS)  # 16 asks for gzip's wrapper
        self._size = 0
        self._packed = 0

    def add(self, text: bytes) -> None:
        """Take the next piece of the text."""
        self._size += len(text)
        self._packed += len(self._compressor.compress(text))

    def bits_per_byte(self) -> float:
        """The compressed size, in bits per byte of the text, which is not empty and ends here."""
        return 8 * (self._packed + len(self._compressor.flush())) / self._size
