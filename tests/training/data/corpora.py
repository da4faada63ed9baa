"""Small corpora on disk, and what a split of them says."""

import json
from pathlib import Path

from moe.training.data.corpus import open_corpus
from moe.training.data.split import SplitCorpus, split_corpus

TEXTS = [f"document {i}, with é and 漢\r\n" for i in range(40)]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def documents(split: SplitCorpus, name: str) -> list[str]:
    found: list[str] = []
    for _, piece in split.pieces(name):
        if piece.first:
            found.append("")
        found[-1] += piece.text
    return found


def everything(path: Path | str, **options) -> list[str]:
    split = split_corpus(open_corpus(str(path), **options))
    return documents(split, "train") + documents(split, "val")


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
