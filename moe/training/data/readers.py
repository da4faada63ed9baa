"""Reading the documents of one file, a piece at a time, as exact UTF-8 text.

Endings and what they hold:

- ``.jsonl``, ``.json``, each also with ``.gz``: one JSON object a line, whose field is one document;
- ``.parquet``: a table, whose column is one document a row;
- any other ending: the file is one document.
"""

import gzip
import json
import zlib
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe.errors import DataError

CHUNK_BYTES = 1 << 18
"""How much of a text file is in memory at a time."""

PARQUET_ROWS = 256
"""How many rows of a parquet file are in memory at a time, beside the column of one row group."""

JSON_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
PARQUET_ENDING = ".parquet"


class UnreadableFileError(Exception):
    """A file cannot be read as what its ending promises; the message is the reason."""


class Piece(NamedTuple):
    """A stretch of text, and whether a document begins with it."""

    text: str
    first: bool


@dataclass(frozen=True)
class Source:
    """A file of a corpus, and what tells that it has changed."""

    path: Path
    """Where it lies."""

    name: str
    """Its path relative to the corpus, with forward slashes: the same on every machine."""

    size: int
    """Bytes."""

    mtime_ns: int
    """Time of the last change, nanoseconds."""

    @property
    def holds_records(self) -> bool:
        """Whether it holds many documents, rather than being one."""
        return self.name.lower().endswith((*JSON_ENDINGS, PARQUET_ENDING))


def read_pieces(
    source: Source, text_field: str, on_bad: Callable[[str], None], *, start: int = 0, stop: int | None = None
) -> Iterator[Piece]:
    """Read the documents of a file in order; empty ones are left out.

    Args:
        source: the file.
        text_field: the field or column that holds the text, for files of records.
        on_bad: told the name of, and the reason for, each record that is left out.
        start: first byte to read, on a character's boundary; for files that are one document only.
        stop: end of the bytes to read, None for the end of the file; likewise.

    Returns:
        Iterator over the pieces. A record is one piece, a file of text as many as it has ``CHUNK_BYTES``.

    Raises:
        UnreadableFileError: the file as a whole cannot be read, which may show only after some pieces.
        DataError: it is a parquet file and pyarrow is not installed.
    """
    if not source.holds_records:
        yield from _read_text(source.path, start, source.size if stop is None else stop)
        return
    records = _read_parquet if source.name.lower().endswith(PARQUET_ENDING) else _read_json_lines
    for text in records(source, text_field, on_bad):
        if text:
            yield Piece(text, first=True)


def _read_text(path: Path, start: int, stop: int) -> Iterator[Piece]:
    """Decode the bytes from ``start`` to ``stop`` strictly, newlines as they are."""
    decoder = getincrementaldecoder("utf-8")()
    first = True
    try:
        with path.open("rb") as file:
            file.seek(start)
            left = stop - start
            while left > 0 and (chunk := file.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                if text := decoder.decode(chunk):
                    yield Piece(text, first)
                    first = False
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"not UTF-8: {error.reason}") from error
    except OSError as error:
        raise UnreadableFileError(f"cannot be read: {error.strerror or error}") from error


def _read_json_lines(source: Source, field: str, on_bad: Callable[[str], None]) -> Iterator[str]:
    """The text of each line's object; blank lines are no records."""
    opener: Any = gzip.open if source.name.lower().endswith(".gz") else open
    try:
        with opener(source.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    # decoded here: json.loads would take UTF-16 and UTF-32 too, and no byte order mark
                    yield _text_of(json.loads(line.decode("utf-8-sig")), field)
                except (ValueError, RecursionError) as error:
                    on_bad(f"{source.name}, line {number}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableFileError(f"cannot be read: {error}") from error


def _read_parquet(source: Source, field: str, on_bad: Callable[[str], None]) -> Iterator[str]:
    """The text of each row, one row group's column in memory at most."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{source.path} is a parquet file, which takes pyarrow to read: pip install 'moe-torch[parquet]'"
        ) from error
    try:
        with ParquetFile(source.path) as table:
            if field not in table.schema_arrow.names:
                raise UnreadableFileError(f"has no column {field!r}, only {table.schema_arrow.names}")
            row = 0
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    try:
                        yield _text_of({field: value.as_py()}, field)
                    except ValueError as error:
                        on_bad(f"{source.name}, row {row}: {error}")
    except (OSError, ArrowException) as error:
        raise UnreadableFileError(f"cannot be read: {error}") from error


def _text_of(record: object, field: str) -> str:
    """The text in a record's field; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        raise ValueError(f"has no field {field!r}, only {list(record)[:8]}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is a {type(text).__name__}, not a string")
    text.encode("utf-8")  # JSON can write half a surrogate pair, which is a str and no text
    return text
