"""From a path to tokens in memory maps, in one call."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, Integer

from moe.errors import ConfigError
from moe.training.data.cache import Manifest, cache_folder, read_manifest
from moe.training.data.corpus import open_corpus
from moe.training.data.readers import Piece
from moe.training.data.references import GzipMeter, count_bytes, unigram_bits_per_byte
from moe.training.data.split import Skipped, SplitCorpus, split_corpus
from moe.training.data.token_file import DamagedFileError, FileSeal, SealedWriter, map_tokens, sealed, token_dtype
from moe.training.data.tokenizer import NUM_BYTES, BpeTokenizer, ByteTokenizer, Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"

BATCH_CHARACTERS = 1 << 20
"""How much text is tokenized at a time."""


@dataclass(frozen=True, eq=False)
class PreparedData:
    """A corpus as tokens, and what is needed to judge a model on it."""

    train: Integer[np.memmap, " L"]
    """``(L,)`` uint16 or uint32 ids; a separator stands before each document."""

    val: Integer[np.memmap, " M"]
    """Likewise; its documents are not in ``train``."""

    tokenizer: Tokenizer
    """What made the tokens."""

    token_bytes: Int[np.ndarray, " V"]
    """``(V,)`` int64, how many bytes of text each id stands for, 0 for the separator."""

    train_bytes: int
    """Bytes of text in ``train``, the sum of its tokens'."""

    val_bytes: int
    """Likewise in ``val``."""

    skipped: Skipped
    """Files and records that could not be read."""

    fingerprint: str
    """Hash of the tokens of both splits and of the tokenizer: the same text, prepared anywhere, has the same."""

    unigram_bpb: float
    """Bits per byte of ``val`` under the byte frequencies of ``train``."""

    gzip_bpb: float
    """Bits per byte of ``val`` by ``gzip -9``."""


def prepare(
    path: str | None = None,
    *,
    tokenizer: Literal["bytes", "bpe"] = "bytes",
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    text_field: str = "text",
    cache_dir: str | None = None,
) -> PreparedData:
    """Tokenize a corpus once, and map the result into memory.

    The result is kept in the cache for as long as the corpus' files keep their names, sizes and times of change, and
    is checked by checksum each time. Of several processes on one machine, let one go first: together they are safe, but
    each does all the work.

    Args:
        path: a folder, file, or glob, see `moe.training.data.open_corpus`; None or ``"stdlib"`` for the source files of
            Python's standard library.
        tokenizer: ``"bytes"``, or ``"bpe"``, trained on the training split.
        vocab_size: ids of a BPE, the separator included; bytes have 257 always.
        val_fraction: expected fraction of the files in validation (of the records, or of the bytes, if there is one
            file only).
        text_field: the field or column that holds the text in .jsonl and .parquet files.
        cache_dir: folder of the cache; None for ``moe-torch`` in the user's cache folder.

    Returns:
        The tokens of both splits, and what is known of them.

    Raises:
        ConfigError: an unknown tokenizer, a vocab_size or val_fraction out of range, a cache_dir that cannot be
            written.
        DataError: the path does not exist, or has too little readable text for two splits.
    """
    if tokenizer not in ("bytes", "bpe"):
        raise ConfigError(f"tokenizer={tokenizer!r} is none of 'bytes', 'bpe'")
    if tokenizer == "bpe" and vocab_size <= NUM_BYTES:
        raise ConfigError(f"vocab_size={vocab_size} is less than {NUM_BYTES} bytes and a separator")
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction={val_fraction} is not between 0 and 1, both excluded")
    corpus = open_corpus(path, text_field=text_field)
    folder = cache_folder(cache_dir, corpus, tokenizer, vocab_size, val_fraction)
    try:
        manifest = read_manifest(folder)
    except DamagedFileError as error:
        logger.warning("the prepared corpus in %s is damaged, so it is made again: %s", folder, error)
        manifest = None
    if manifest is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache_dir={str(folder.parent)!r} cannot be written: {error.strerror}") from error
        manifest = _build(split_corpus(corpus, val_fraction), tokenizer, vocab_size, folder)
    return _open(folder, manifest)


def _open(folder: Path, manifest: Manifest) -> PreparedData:
    """Map what a folder holds."""
    tokenizer: Tokenizer = ByteTokenizer()
    if TOKENIZER_FILE in manifest.files:
        tokenizer = BpeTokenizer.from_json((folder / TOKENIZER_FILE).read_text("utf-8"))
    return PreparedData(
        train=map_tokens(folder / "train.bin", tokenizer.vocab_size),
        val=map_tokens(folder / "val.bin", tokenizer.vocab_size),
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes,
        train_bytes=manifest.train_bytes,
        val_bytes=manifest.val_bytes,
        skipped=manifest.skipped,
        fingerprint=manifest.fingerprint,
        unigram_bpb=manifest.unigram_bpb,
        gzip_bpb=manifest.gzip_bpb,
    )


def _build(split: SplitCorpus, kind: str, vocab_size: int, folder: Path) -> Manifest:
    """Tokenize both splits into a folder, and seal it."""
    files: dict[str, FileSeal] = {}
    tokenizer: Tokenizer = ByteTokenizer()
    if kind == "bpe":
        bpe = BpeTokenizer.train((piece.text for _, piece in split.pieces("train")), vocab_size)
        with sealed(folder / TOKENIZER_FILE) as out:
            out.write(bpe.to_json().encode("utf-8"))
            files[TOKENIZER_FILE] = out.seal()
        tokenizer = bpe
    with sealed(folder / "train.bin") as train_file, sealed(folder / "val.bin") as val_file:
        gzip = GzipMeter()
        train = _TokenWriter(train_file, tokenizer)
        val = _TokenWriter(val_file, tokenizer, gzip)
        for name, piece in split.pieces("train", "val"):  # one pass over both, because one file may hold both
            (train if name == "train" else val).add(piece)
        files["train.bin"], files["val.bin"] = train.finish(), val.finish()
    manifest = Manifest(
        files=files,
        train_bytes=int(train.counts.sum()),
        val_bytes=int(val.counts.sum()),
        unigram_bpb=unigram_bits_per_byte(train.counts, val.counts),
        gzip_bpb=gzip.bits_per_byte(),
        skipped=split.skipped,
    )
    manifest.write(folder)
    return manifest


class _TokenWriter:
    """Tokenizes the pieces of a split into a file, a batch at a time, and counts its bytes."""

    def __init__(self, out: SealedWriter, tokenizer: Tokenizer, gzip: GzipMeter | None = None) -> None:
        self._out = out
        self._tokenizer = tokenizer
        self._gzip = gzip
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._batch: list[Piece] = []
        self._size = 0
        self.counts = np.zeros(NUM_BYTES, dtype=np.int64)

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self._batch.append(piece)
        self._size += len(piece.text) + 64  # a million records of one character would fill memory too
        if self._size >= BATCH_CHARACTERS:
            self._flush()

    def finish(self) -> FileSeal:
        """Write what is left."""
        self._flush()
        return self._out.seal()

    def _flush(self) -> None:
        separator = np.array([self._tokenizer.separator_id], dtype=self._dtype)
        texts = [piece.text for piece in self._batch]
        for piece, ids in zip(self._batch, self._tokenizer.encode_batch(texts)):
            if piece.first:
                self._out.write(separator.tobytes())
            self._out.write(ids.astype(self._dtype).tobytes())
        raw = "".join(texts).encode("utf-8")
        self.counts += count_bytes(raw)
        if self._gzip is not None:
            self._gzip.add(raw)
        self._batch, self._size = [], 0
