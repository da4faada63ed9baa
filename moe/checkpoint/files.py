"""The files of a checkpoint: written to the disk and not to its cache only, read in pieces, held against their sums."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moe.errors import CheckpointError

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ModuleNotFoundError as error:
    raise ImportError("moe.checkpoint needs the package safetensors: pip install 'moe-torch[train]'") from error

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"
RECORD = "checkpoint.json"
SUMS = "SHA256SUMS"

FILES = (RECORD, MODEL, OPTIMIZER, RANDOM)
"""Every file of a checkpoint but ``SHA256SUMS``, in the order of its lines."""

_SUMS_PATTERN = re.compile(
    "".join(rf"(?P<_{i}>[0-9a-f]{{64}})  {re.escape(n)}\n" for i, n in enumerate(FILES)).encode()
)


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged and was passed over, or an old one could not be deleted."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file and wait until the disk has them.

    Args:
        path: the file.
        tensors: name -> tensor of any device and layout. Those that share memory are each written in full.
    """
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        # The format knows neither strides nor shared memory; only tensors that need it are copied.
        storage = storage_id(tensor)
        copy = storage in seen or not tensor.is_contiguous()
        separate[name] = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
        seen.add(storage)
    with _naming(path):
        save_file(separate, path)
        # safetensors keeps its files from everybody but their owner; the folder's mode is what the umask leaves.
        path.chmod(path.parent.stat().st_mode & 0o666)
        sync(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with _naming(path):
        path.write_bytes(content)
        sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory: pages are read when they are used, and changes never reach the file.

    Raises:
        CheckpointError: the file is not there, or not of this format.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` for the files in a folder."""
    write_bytes(folder / SUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in FILES).encode())


def read_sums(folder: Path) -> dict[str, str]:
    """Read ``SHA256SUMS``: file name -> digest in hexadecimal.

    Raises:
        CheckpointError: it is not there, or differs in so much as a byte from what was written.
    """
    match = _SUMS_PATTERN.fullmatch(read_bytes(folder / SUMS))
    if match is None:
        raise CheckpointError(f"{SUMS} is damaged")
    return {name: digest.decode() for name, digest in zip(FILES, match.groups())}


def read_bytes(path: Path) -> bytes:
    """Read a small file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def verify_file(path: Path, size: int, digest: str) -> None:
    """Hold a file against its size in bytes and its SHA-256, without reading the whole of it into memory.

    Raises:
        CheckpointError: it differs, or cannot be read.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path.name} has {found} bytes where {size} were written")
        if sha256(path) != digest:
            raise CheckpointError(f"{path.name} does not have the SHA-256 that was written")
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that the kernel takes back when the process dies, however it dies.

    Args:
        path: the lock's file, made if it is not there.
        wait: whether to wait for another process that holds it.

    Returns:
        A context whose value says whether the lock is held; always True with ``wait``.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:  # closing is not enough: a child forked meanwhile has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)


def storage_id(tensor: Tensor) -> int:
    """The same number for tensors that live in the same memory, for empty and meta tensors too."""
    return tensor.untyped_storage()._cdata


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Note on an error which file was being written; neither fsync nor safetensors says."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while writing {path.name}")
        raise
