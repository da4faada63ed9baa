"""Which files a corpus is made of."""

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe.errors import DataError
from moe.training.data.readers import JSON_ENDINGS, PARQUET_ENDING, Source

STDLIB = "stdlib"
"""The path that stands for the source files of Python's own standard library."""

FOLDER_ENDINGS = (".txt", ".md", ".rst", ".py", *JSON_ENDINGS, PARQUET_ENDING)
"""What is taken from a folder; a glob or a file's own path takes any ending."""


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in a fixed order; nothing of them is read yet."""

    path: str
    """As the user gave it."""

    root: Path
    """The folder that the files' names are relative to."""

    sources: tuple[Source, ...]
    """Sorted by name."""

    text_field: str
    """The field, or column, that holds the text in files of records."""

    unreadable: tuple[str, ...]
    """Name and reason of each file that cannot be opened."""


def open_corpus(path: str | None = None, *, text_field: str = "text") -> Corpus:
    """List the files of a corpus.

    Args:
        path: one of:

            - None or ``"stdlib"``: the ``*.py`` files of Python's standard library, without site-packages;
            - a folder: every file below it with one of ``FOLDER_ENDINGS``; names that begin with a dot are left out,
              links to folders are not followed;
            - a file, or a glob (``**`` for any depth): those files, whatever their ending.

            What a file holds is told by its ending, see `moe.training.data.readers`.
        text_field: the field, or column, that holds the text in .jsonl and .parquet files.

    Returns:
        The corpus. Files that cannot be opened are in ``unreadable``.

    Raises:
        DataError: the path does not exist, or names no file.
    """
    if path is None or path == STDLIB:
        shown, root = STDLIB, Path(sysconfig.get_path("stdlib"))
        files: Iterable[Path] = _walk(root, (".py",), left_out={"site-packages", "dist-packages", "__pycache__"})
    else:
        shown, root, files = path, *_find(path)
    sources, unreadable = [], []
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in set(files)):
        try:
            sources.append(_source(file, name))
        except OSError as error:
            unreadable.append(f"{name}: {error.strerror or error}")
    if not sources:
        named = f"; unreadable: {'; '.join(unreadable[:8])}" if unreadable else ""
        endings = f" with one of the endings {' '.join(FOLDER_ENDINGS)}" if root.is_dir() and not named else ""
        raise DataError(f"path={shown!r} ({root}) holds no readable file{endings}{named}")
    return Corpus(shown, root, tuple(sources), text_field, tuple(unreadable))


def _find(path: str) -> tuple[Path, Iterable[Path]]:
    """The root and the files of a path that is a folder, a file or a glob."""
    if not path:
        raise DataError("path='' names nothing; give a folder, a file, a glob, or 'stdlib'")
    place = Path(path).expanduser()
    if place.is_dir():
        return place, _walk(place, FOLDER_ENDINGS, left_out=set())
    if os.path.lexists(place):
        return place.parent, [place]
    if not glob.has_magic(path):
        raise DataError(f"path={path!r} does not exist")
    # The root is the part before the first wildcard, whatever matches, so that names stay when a file is added.
    fixed = []
    for part in place.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    # not Path.glob, which takes hidden files too and, before 3.13, no files for a "**" at the end
    matches = (Path(match) for match in glob.iglob(str(place), recursive=True))  # noqa: PTH207
    return Path(*fixed), (match for match in matches if not match.is_dir())


def _walk(root: Path, endings: tuple[str, ...], left_out: set[str]) -> Iterator[Path]:
    """Files below a folder by ending, without hidden ones and without the folders of some names."""
    unlisted: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=lambda error: unlisted.append(Path(error.filename))):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in files:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(folder, name)
    yield from unlisted  # no files, and so named as unreadable rather than passed over in silence


def _source(file: Path, name: str) -> Source:
    """Describe a file; OSError if it cannot be opened."""
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        raise OSError("a folder that cannot be listed")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")  # opening a pipe would wait for ever
    if not os.access(file, os.R_OK):
        raise OSError("no permission to read it")
    return Source(file, name, status.st_size, status.st_mtime_ns)
