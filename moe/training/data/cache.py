"""Prepared corpora on disk, each in a folder of its own.

A folder holds ``train.bin``, ``val.bin``, for BPE ``tokenizer.json``, and ``manifest.json``, which is written last and
seals the others. The folder's name is a hash of everything that its content depends on, so two processes that prepare
the same corpus at once write the same bytes, and it does not matter whose stay. Any folder may be deleted at any time.
"""

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from moe.training.data.corpus import STDLIB, Corpus
from moe.training.data.split import Skipped
from moe.training.data.token_file import DamagedFileError, FileSeal, sealed
from moe.training.data.tokenizer import TOKENIZERS_VERSION

FORMAT = 1
"""Changes whenever the same corpus would be written in another way."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What is known of a prepared corpus beside its tokens."""

    files: dict[str, FileSeal]
    """Name of each other file in the folder."""

    train_bytes: int
    """Bytes of UTF-8 text in the training split."""

    val_bytes: int
    """Likewise in validation."""

    unigram_bpb: float
    """Bits per byte of validation under the training split's byte frequencies."""

    gzip_bpb: float
    """Bits per byte of validation by ``gzip -9``."""

    skipped: Skipped
    """What was not read."""

    @property
    def fingerprint(self) -> str:
        """Hash of the files' content."""
        return _hash({name: seal.checksum for name, seal in self.files.items()})

    def write(self, folder: Path) -> None:
        """Put the manifest beside the files it seals."""
        body = asdict(self)
        with sealed(folder / MANIFEST) as out:
            out.write(json.dumps({"checksum": _hash(body), "body": body}, indent=1).encode())


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest and check the whole folder against it.

    Args:
        folder: as `cache_folder` named it.

    Returns:
        The manifest, or None if there is none.

    Raises:
        DamagedFileError: the manifest, or a file it seals, is not what was written.
    """
    try:
        stored = json.loads((folder / MANIFEST).read_bytes())
        body = stored["body"]
        intact = stored["checksum"] == _hash(body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{MANIFEST} cannot be read: {error}") from error
    if not intact:
        raise DamagedFileError(f"{MANIFEST} does not have its own checksum")
    files = {name: FileSeal(**seal) for name, seal in body.pop("files").items()}
    skipped = Skipped(body["skipped"]["count"], tuple(body.pop("skipped")["named"]))
    for name, seal in files.items():
        seal.check(folder / name)
    return Manifest(files=files, skipped=skipped, **body)


def cache_folder(cache_dir: str | None, corpus: Corpus, tokenizer: str, vocab_size: int, val_fraction: float) -> Path:
    """The folder for a corpus prepared in one way.

    Args:
        cache_dir: where such folders are; None for ``moe-torch`` in the user's cache (``$XDG_CACHE_HOME``, or else
            ``~/.cache``).
        corpus: enters with the names, sizes and times of change of its files.
        tokenizer: ``"bytes"`` or ``"bpe"``.
        vocab_size: enters for BPE.
        val_fraction: enters as it is.

    Returns:
        A path that may not exist yet.
    """
    recipe = {
        "format": FORMAT,
        "python": platform.python_version() if corpus.path == STDLIB else None,
        "root": os.fsencode(corpus.root.resolve()).hex(),
        "files": [(os.fsencode(source.name).hex(), source.size, source.mtime_ns) for source in corpus.sources],
        "unreadable": [os.fsencode(what).hex() for what in corpus.unreadable],
        "text_field": corpus.text_field,
        "tokenizer": ["bpe", vocab_size, TOKENIZERS_VERSION] if tokenizer == "bpe" else tokenizer,
        "val_fraction": val_fraction,
    }
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the standard has relative paths ignored
    default = (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "moe-torch"
    return (Path(cache_dir).expanduser() if cache_dir else default) / f"corpus-{_hash(recipe)}"


def _hash(content: object) -> str:
    """128 bits of BLAKE2b of the content's JSON, hexadecimal."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
