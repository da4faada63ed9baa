"""Tokens on disk: written once and whole, mapped into memory, checked before use."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer

from moe.training.atomic import replacing


class DamagedFileError(Exception):
    """A file is not what was written; the message says in what it differs."""


@dataclass(frozen=True)
class FileSeal:
    """What a file must measure up to."""

    size: int
    """Bytes."""

    checksum: str
    """BLAKE2b of the bytes, 128 bits, hexadecimal."""

    def check(self, path: Path) -> None:
        """Read the file through, a block at a time.

        Raises:
            DamagedFileError: it is missing, or has another size or checksum.
        """
        try:
            size = path.stat().st_size
            if size != self.size:
                raise DamagedFileError(f"{path.name} has {size} bytes, not {self.size}")
            with path.open("rb") as file:
                checksum = hashlib.file_digest(file, _hasher).hexdigest()
        except OSError as error:
            raise DamagedFileError(f"{path.name} cannot be read: {error.strerror or error}") from error
        if checksum != self.checksum:
            raise DamagedFileError(f"{path.name} has checksum {checksum}, not {self.checksum}")


class SealedWriter:
    """Writes bytes to a file and keeps account of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._hash = _hasher()

    def write(self, block: bytes) -> None:
        """Append bytes."""
        self._file.write(block)
        self._size += len(block)
        self._hash.update(block)

    def seal(self) -> FileSeal:
        """Size and checksum of what was written until now."""
        return FileSeal(self._size, self._hash.hexdigest())


@contextmanager
def sealed(path: Path) -> Iterator[SealedWriter]:
    """Write a file that appears under its name whole, or not at all, and keep account of what is in it.

    Args:
        path: where the file will be; its folder exists.

    Returns:
        Context whose end puts the file in place.
    """
    with replacing(path) as file:
        yield SealedWriter(file)


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of little-endian uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def map_tokens(path: Path, vocab_size: int) -> Integer[np.memmap, " L"]:
    """Map a file of tokens into memory, read-only.

    Args:
        path: a file that is not empty, of ids of ``token_dtype(vocab_size)``.
        vocab_size: number of ids.

    Returns:
        ``(L,)`` uint16 or uint32.
    """
    return np.memmap(path, dtype=token_dtype(vocab_size), mode="r")


def _hasher() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
