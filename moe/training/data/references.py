"""What simple compressors reach on the same text, to set a model's bits per byte beside."""

import math
import zlib
from collections.abc import Iterable

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


def gzip_bits_per_byte(text: Iterable[bytes]) -> float:
    """Bits per byte that ``gzip -9`` needs, header and checksum included.

    Args:
        text: pieces of a text that is not empty; one is in memory at a time.

    Returns:
        Bits per byte.
    """
    compressor = zlib.compressobj(level=9, wbits=16 + zlib.MAX_WBITS)  # 16 asks for gzip's wrapper
    size = packed = 0
    for piece in text:
        size += len(piece)
        packed += len(compressor.compress(piece))
    return 8 * (packed + len(compressor.flush())) / size
