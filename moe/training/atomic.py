"""Files that appear under their name whole, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file under another name, force it to the disk, and rename it.

    Whoever has the former file open keeps it. Two writers at once do not meet: the later one's file stays.

    Args:
        path: where the file will be; its folder exists.

    Returns:
        Context whose end puts the file in place.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it the new name may be lost with the power
    finally:
        os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file so that a reader, or a crash, sees the old content or the new one, never a part.

    Args:
        path: the file; its folder exists.
        text: the whole new content.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
