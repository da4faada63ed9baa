"""Which documents are for training and which for validation.

The choice is made by a hash of what a file is called, or of what a record says, so it depends on no order and adding a
file moves no other. A corpus of one file is split by record; one file of text is cut in two, validation last.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from moe.errors import ConfigError, DataError
from moe.training.data.corpus import Corpus
from moe.training.data.readers import CHUNK_BYTES, Piece, Source, UnreadableFileError, read_pieces

logger = logging.getLogger(__name__)

SplitName = Literal["train", "val"]

NAMED = 20
"""How many of the skipped files and records are named, in the log and in the result; the rest is only counted."""


@dataclass(frozen=True)
class Skipped:
    """What of a corpus was passed over."""

    count: int
    """How many files and records."""

    named: tuple[str, ...]
    """Name and reason of the first ones."""


class SkipLog:
    """Counts what is passed over, and warns of the first ones by name."""

    def __init__(self) -> None:
        self._count = 0
        self._named: list[str] = []

    def add(self, what: str) -> None:
        """Note one file or record: its name and the reason."""
        self._count += 1
        if self._count <= NAMED:
            what = what.encode("utf-8", "backslashreplace").decode()  # file names may hold any bytes
            self._named.append(what)
            logger.warning("skipped %s", what)
        elif self._count == NAMED + 1:
            logger.warning("more than %d files or records skipped; the rest is counted, not named", NAMED)

    def result(self) -> Skipped:
        """What was noted until now."""
        return Skipped(self._count, tuple(self._named))


@dataclass
class HashSplit:
    """Puts items under a hash threshold into validation; one item changes sides if a side were empty without it."""

    val_fraction: float
    count: int = 0
    num_val: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None

    def add(self, key: bytes) -> None:
        """Tell of an item, in the order in which ``choose`` will be asked."""
        item = (_stable_hash(key), self.count)
        self.count += 1
        self.num_val += self._under(item)
        self.smallest = item if self.smallest is None else min(item, self.smallest)
        self.largest = item if self.largest is None else max(item, self.largest)

    def choose(self, key: bytes, index: int) -> SplitName:
        """The split of an item, ``index`` in the order."""
        item = (_stable_hash(key), index)
        in_val = self._under(item)
        if self.num_val == 0:
            in_val = item == self.smallest
        elif self.num_val == self.count:
            in_val = item != self.largest
        return "val" if in_val else "train"

    def _under(self, item: tuple[int, int]) -> bool:
        return item[0] < self.val_fraction * 2**64


@dataclass(frozen=True)
class Part:
    """A stretch of a file, and the split it belongs to, or what tells the split of each of its records."""

    source: Source
    split: SplitName | HashSplit
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class SplitCorpus:
    """A corpus in two splits, both of which have text."""

    corpus: Corpus
    parts: tuple[Part, ...]
    skipped: Skipped
    """Files that cannot be read or are not UTF-8, and records without text."""

    def pieces(self, *splits: SplitName) -> Iterator[tuple[SplitName, Piece]]:
        """Read the text of one split or of both, in order, in pieces of bounded size (or one record).

        Raises:
            DataError: a file has changed since the corpus was split and can no longer be read.
        """
        for part in self.parts:
            if not isinstance(part.split, HashSplit) and part.split not in splits:
                continue
            pieces = read_pieces(part.source, self.corpus.text_field, _ignore, start=part.start, stop=part.stop)
            try:
                for index, piece in enumerate(pieces):
                    split = part.split
                    if isinstance(split, HashSplit):
                        split = split.choose(piece.text.encode(), index)
                    if split in splits:
                        yield split, piece
            except UnreadableFileError as error:
                raise DataError(f"{part.source.path} changed while it was read: {error}") from error


def split_corpus(corpus: Corpus, val_fraction: float = 0.05) -> SplitCorpus:
    """Read a corpus once to find what is readable, and split that.

    Args:
        corpus: the files.
        val_fraction: the expected fraction of files (or of records, or of bytes, see the module) in validation. Each
            split gets one at least.

    Returns:
        The splits. What could not be read is named in the log, skipped and counted.

    Raises:
        ConfigError: val_fraction is not between 0 and 1.
        DataError: no text, or too few documents for two splits.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction={val_fraction} is not between 0 and 1, both excluded")
    skips = SkipLog()
    for what in corpus.unreadable:
        skips.add(what)
    scans = [scan for source in corpus.sources if (scan := _scan(source, corpus, val_fraction, skips))]
    skipped = skips.result()
    if not scans:
        named = f"; {skipped.count} skipped, among them {'; '.join(skipped.named[:3])}" if skipped.count else ""
        raise DataError(
            f"path={corpus.path!r} has no text: {len(corpus.sources)} file(s), text_field={corpus.text_field!r}{named}"
        )
    if len(scans) > 1:
        parts = _split_files([scan.source for scan in scans], val_fraction)
    elif scans[0].source.holds_records:
        parts = _split_records(scans[0])
    else:
        parts = _cut_text(scans[0].source, val_fraction)
    return SplitCorpus(corpus, parts, skipped)


@dataclass(frozen=True)
class _Scan:
    """A file that has text, and how its records would be split if it were the only one."""

    source: Source
    records: HashSplit = field(repr=False)


def _scan(source: Source, corpus: Corpus, val_fraction: float, skips: SkipLog) -> _Scan | None:
    """Read a file to its end; None if it has no text or cannot be read."""
    records = HashSplit(val_fraction)
    empty = True
    try:
        for piece in read_pieces(source, corpus.text_field, skips.add):
            empty = False
            if source.holds_records:
                records.add(piece.text.encode())
    except UnreadableFileError as error:
        skips.add(f"{source.name}: {error}")
        return None
    return None if empty else _Scan(source, records)


def _split_files(sources: list[Source], val_fraction: float) -> tuple[Part, ...]:
    keys = [os.fsencode(source.name) for source in sources]
    chooser = HashSplit(val_fraction)
    for key in keys:
        chooser.add(key)
    return tuple(Part(source, chooser.choose(key, i)) for i, (source, key) in enumerate(zip(sources, keys)))


def _split_records(scan: _Scan) -> tuple[Part, ...]:
    if scan.records.count < 2:
        raise DataError(f"{scan.source.path} has one document; train and validation need one each")
    return (Part(scan.source, scan.records),)


def _cut_text(source: Source, val_fraction: float) -> tuple[Part, ...]:
    """Cut a file of text after a line, or else a character, so that the tail is about ``val_fraction`` of its bytes."""
    target = max(1, int(source.size * (1 - val_fraction)))
    lowest = max(1, target - 3)  # a character has 4 bytes at most
    with source.path.open("rb") as file:
        file.seek(lowest)
        near = file.read(7)
        file.seek(target)
        newline = file.read(CHUNK_BYTES).find(b"\n")
    cut = target + newline + 1
    if newline < 0 or cut == source.size:
        starts = [at for at, byte in enumerate(near, start=lowest) if byte & 0xC0 != 0x80]  # 10xxxxxx goes on
        if not starts:
            raise DataError(f"{source.path} has {source.size} byte(s), too few to cut into train and validation")
        cut = min(starts, key=lambda at: abs(at - target))
    return Part(source, "train", stop=cut), Part(source, "val", start=cut)


def _stable_hash(key: bytes) -> int:
    """64 bits that are the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _ignore(_: str) -> None:
    """Records that the scan has named need no second warning."""
