"""A path becomes tokens, once."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe.errors import ConfigError, DataError
from moe.training.data import BpeTokenizer, ByteTokenizer, prepare
from moe.training.data import prepare as prepare_function
from moe.training.data.readers import CHUNK_BYTES
from tests.training.data.corpora import TEXTS, json_lines, write

FILES = {f"{i:02}.txt": f"text {i} of the corpus, é 漢\n" * (i + 1) for i in range(40)}


@pytest.fixture
def corpus(tmp_path) -> str:
    return str(write(tmp_path / "corpus", FILES))


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def content(cache: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(cache).rglob("*") if path.is_file()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_tokens_are_the_text_with_a_separator_before_each_document(corpus, cache, tokenizer):
    data = prepare(corpus, tokenizer=tokenizer, vocab_size=300, val_fraction=0.2, cache_dir=cache)
    separator = data.tokenizer.separator_id
    found = []
    for tokens, size in ((data.train, data.train_bytes), (data.val, data.val_bytes)):
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert tokens[0] == separator
        texts = [data.tokenizer.decode(ids) for ids in np.split(tokens, np.flatnonzero(tokens == separator))[1:]]
        assert size == sum(len(text.encode()) for text in texts) == data.token_bytes[tokens].sum()
        found += texts
    assert sorted(found) == sorted(FILES.values())
    assert data.skipped.count == 0
    with pytest.raises(ValueError, match="read-only"):
        data.train[0] = 0


def test_a_document_of_many_pieces_has_one_separator(tmp_path, cache):
    text = "a line\n" * CHUNK_BYTES
    data = prepare(str(write(tmp_path / "c", {"a.txt": text, "b.txt": "short"})), cache_dir=cache)
    assert np.count_nonzero(data.train == 256) == np.count_nonzero(data.val == 256) == 1
    assert {data.train_bytes, data.val_bytes} == {len(text), len("short")}


def test_tokens_of_a_large_vocabulary_are_wider(tmp_path, cache):
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size=(22_000, 8))
    words = " ".join("".join(word) for word in letters) + " "
    path = write(tmp_path, {"a.txt": words * 2, "b.txt": "b"})
    data = prepare(str(path / "*.txt"), tokenizer="bpe", vocab_size=70_000, cache_dir=cache)
    assert data.tokenizer.vocab_size > 1 << 16
    assert data.train.dtype == np.uint32
    assert {data.tokenizer.decode(data.train), data.tokenizer.decode(data.val)} == {words * 2, "b"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_two_preparations_are_the_same_to_the_byte(tmp_path, corpus, tokenizer):
    first = prepare(corpus, tokenizer=tokenizer, vocab_size=300, cache_dir=str(tmp_path / "1"))
    second = prepare(corpus, tokenizer=tokenizer, vocab_size=300, cache_dir=str(tmp_path / "2"))
    assert content(str(tmp_path / "1")) == content(str(tmp_path / "2"))
    assert first.fingerprint == second.fingerprint


def test_fingerprint_is_of_the_text_not_of_where_it_lies(tmp_path, corpus, cache):
    moved = str(write(tmp_path / "moved", FILES))
    changed = str(write(tmp_path / "changed", {**FILES, "00.txt": "other"}))
    first, second, third = (prepare(path, cache_dir=cache).fingerprint for path in (corpus, moved, changed))
    assert first == second != third


def test_references_do_not_depend_on_the_tokenizer(corpus, cache):
    by_bytes = prepare(corpus, val_fraction=0.2, cache_dir=cache)
    by_bpe = prepare(corpus, tokenizer="bpe", vocab_size=300, val_fraction=0.2, cache_dir=cache)
    assert by_bytes.val_bytes == by_bpe.val_bytes
    assert by_bytes.unigram_bpb == by_bpe.unigram_bpb
    assert by_bytes.gzip_bpb == by_bpe.gzip_bpb
    # the corpus repeats itself, so gzip beats single bytes, which beat 8 bits
    assert 0 < by_bytes.gzip_bpb < by_bytes.unigram_bpb < 8
    separator = by_bytes.tokenizer.separator_id
    train, val = (np.bincount(t[t != separator], minlength=256) for t in (by_bytes.train, by_bytes.val))
    bits = -np.log2((train + 1) / (train.sum() + 256))
    assert by_bytes.unigram_bpb == pytest.approx((val * bits).sum() / val.sum(), rel=1e-12)


@pytest.fixture
def no_work(monkeypatch):
    """After this, nothing may be read or trained."""
    module = sys.modules[prepare_function.__module__]

    def start() -> None:
        monkeypatch.setattr(module, "split_corpus", lambda *_: pytest.fail("the corpus is read again"))
        monkeypatch.setattr(BpeTokenizer, "train", lambda *_: pytest.fail("the BPE is trained again"))

    return start


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_second_time_is_from_the_cache(corpus, cache, tokenizer, no_work):
    write(Path(corpus), {"bad.txt": b"\xff"})
    first = prepare(corpus, tokenizer=tokenizer, vocab_size=300, cache_dir=cache)
    no_work()
    second = prepare(corpus, tokenizer=tokenizer, vocab_size=300, cache_dir=cache)
    for name in ("train", "val", "token_bytes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("train_bytes", "val_bytes", "skipped", "fingerprint", "unigram_bpb", "gzip_bpb"):
        assert getattr(first, name) == getattr(second, name), name
    assert second.skipped.count == 1
    assert type(second.tokenizer) is (BpeTokenizer if tokenizer == "bpe" else ByteTokenizer)
    np.testing.assert_array_equal(first.tokenizer.encode("text é"), second.tokenizer.encode("text é"))


def test_bpe_knows_the_training_split_only(tmp_path, cache):
    path = write(tmp_path / "c", {"a.txt": "abab " * 500 + "\n" + "zqzq " * 100})
    data = prepare(str(path / "a.txt"), tokenizer="bpe", vocab_size=270, val_fraction=0.17, cache_dir=cache)
    assert data.tokenizer.decode(data.val).startswith("zqzq")
    assert len(data.tokenizer.encode(" abab")) == 1
    assert len(data.tokenizer.encode("zqzq")) == 4


@pytest.mark.parametrize("change", ["content", "time", "added", "fraction", "tokenizer", "vocab_size"])
def test_a_change_is_prepared_anew(corpus, cache, change):
    options = {"tokenizer": "bpe", "vocab_size": 300, "val_fraction": 0.2, "cache_dir": cache}
    prepare(corpus, **options)
    file = Path(corpus, "00.txt")
    if change == "content":
        write(Path(corpus), {"00.txt": "changed"})
    elif change == "time":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "added":
        write(Path(corpus), {"new.txt": "new"})
    options |= {"fraction": {"val_fraction": 0.3}, "tokenizer": {"tokenizer": "bytes"}}.get(change, {})
    options |= {"vocab_size": 301} if change == "vocab_size" else {}
    prepare(corpus, **options)
    assert len(list(Path(cache).iterdir())) == 2


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def change_a_number(path: Path) -> None:
    stored = json.loads(path.read_bytes())
    stored["body"]["gzip_bpb"] += 1
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.bin", flip, "train.bin has checksum"),
        ("val.bin", cut, "val.bin has .* bytes, not"),
        ("train.bin", Path.unlink, "train.bin cannot be read"),
        ("tokenizer.json", flip, "tokenizer.json has checksum"),
        ("manifest.json", cut, "manifest.json cannot be read"),
        ("manifest.json", change_a_number, "manifest.json does not have its own checksum"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_cache_is_named_and_made_again(corpus, cache, caplog, name, damage, reason):
    options = {"tokenizer": "bpe", "vocab_size": 300, "cache_dir": cache}
    first = prepare(corpus, **options)
    whole = content(cache)
    damage(next(Path(cache).rglob(name)))
    again = prepare(corpus, **options)
    assert content(cache) == whole
    assert again.fingerprint == first.fingerprint
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "is damaged, so it is made again" in warning
    assert re.search(reason, warning)


def test_a_preparation_that_died_leaves_nothing_that_counts(corpus, cache, monkeypatch):
    def die(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(OSError, match="No space"):
            prepare(corpus, cache_dir=cache)
    assert content(cache) == {}
    assert prepare(corpus, cache_dir=cache).train_bytes > 0
    assert sorted(content(cache)) == ["manifest.json", "train.bin", "val.bin"]


def test_processes_that_prepare_at_once_all_get_it_right(corpus, cache):
    code = f"""
from moe.training.data import prepare
for _ in range(3):
    data = prepare({corpus!r}, tokenizer="bpe", vocab_size=300, cache_dir={cache!r})
    assert data.token_bytes[data.train].sum() == data.train_bytes
print(data.fingerprint)
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = [run.communicate()[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert prints == [prepare(corpus, tokenizer="bpe", vocab_size=300, cache_dir=cache).fingerprint] * 2
    assert sorted(content(cache)) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_default_cache_is_the_users(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(corpus)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare(corpus)
    for base in ("xdg", "home/.cache"):
        assert len(list((tmp_path / base / "moe-torch").iterdir())) == 1
    assert not Path("relative").exists()


def test_records_in_one_file(tmp_path, cache):
    path = write(tmp_path / "c", {"a.jsonl": json_lines(TEXTS)})
    data = prepare(str(path), val_fraction=0.3, cache_dir=cache)
    assert data.train_bytes + data.val_bytes == sum(len(text.encode()) for text in TEXTS)
    assert np.count_nonzero(data.train == 256) + np.count_nonzero(data.val == 256) == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer='words' is none of 'bytes', 'bpe'"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size=256"),
        ({"val_fraction": 1.0}, "val_fraction=1.0 is not between 0 and 1"),
        ({"val_fraction": math.nan}, "val_fraction=nan"),
    ],
)
def test_options_out_of_range(corpus, cache, options, message):
    function = getattr(prepare, "__wrapped__", prepare)  # the checker of annotations would be first
    with pytest.raises(ConfigError, match=message):
        function(corpus, cache_dir=cache, **options)
    assert not Path(cache).exists()


def test_cache_dir_that_cannot_be_written(corpus, tmp_path):
    write(tmp_path, {"file": ""})
    with pytest.raises(ConfigError, match=r"cache_dir='.*file' cannot be written: (Not a directory|File exists)"):
        prepare(corpus, cache_dir=str(tmp_path / "file"))


def test_empty_corpus_leaves_no_cache(tmp_path, cache):
    write(tmp_path / "c", {"a.txt": "", "b.txt": b"\xff"})
    with pytest.raises(DataError, match="has no text"):
        prepare(str(tmp_path / "c"), cache_dir=cache)
    assert content(cache) == {}
