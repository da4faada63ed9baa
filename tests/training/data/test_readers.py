"""What is read from each kind of file, and what is passed over."""

import gzip
import logging
import os
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from moe.errors import DataError
from moe.training.data.corpus import open_corpus
from moe.training.data.readers import CHUNK_BYTES
from moe.training.data.split import split_corpus
from tests.training.data.corpora import TEXTS, documents, everything, json_lines, write


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_lines(tmp_path, compress, ending):
    content = json_lines(TEXTS, field="body")
    name = f"data.{ending}" + (".gz" if compress else "")
    write(tmp_path, {name: gzip.compress(content) if compress else content})
    assert sorted(everything(tmp_path / name, text_field="body")) == sorted(TEXTS)


def test_parquet_over_several_row_groups(tmp_path):
    texts = [f"row {i}" for i in range(700)]
    parquet.write_table(pa.table({"n": range(700), "text": texts}), tmp_path / "data.parquet", row_group_size=300)
    assert sorted(everything(tmp_path / "data.parquet")) == sorted(texts)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "data.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"data\.parquet is a parquet file.*pip install 'moe-torch\[parquet\]'"):
        split_corpus(open_corpus(str(tmp_path)))


def test_text_is_kept_to_the_byte_across_chunks(tmp_path):
    text = "\ufeffa" + "漢\r\n" * CHUNK_BYTES  # three-byte characters that fall on both sides of a chunk's end
    write(tmp_path, {"a.txt": text, "b.txt": "other"})
    assert sorted(everything(tmp_path)) == sorted([text, "other"])


def test_bad_json_lines_are_named_skipped_and_counted(tmp_path, caplog):
    good = json_lines(["one", "two"]).splitlines(keepends=True)
    bad = {
        b"{broken\n": "Expecting",
        b'{"other": "x"}\n': "has no field 'text', only ['other']",
        b'["list"]\n': "is a list, not an object",
        b'{"text": 3}\n': "field 'text' is a int, not a string",
        b'{"text": "\xff"}\n': "utf-8",
        b'{"text": "\\ud800"}\n': "surrogates not allowed",
        b"[" * 100_000 + b"\n": "recursion",
    }
    write(tmp_path, {"x.jsonl": b"".join([good[0], b"\n", b'{"text": ""}\n', *bad, good[1]])})
    split = split_corpus(open_corpus(str(tmp_path)))
    assert sorted(documents(split, "train") + documents(split, "val")) == ["one", "two"]
    assert split.skipped.count == len(bad)
    for line, (what, reason) in enumerate(zip(split.skipped.named, bad.values()), start=4):
        assert what.startswith(f"x.jsonl, line {line}: ")
        assert reason in what
        assert any(what in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_many_bad_lines_are_counted_but_not_all_named(tmp_path, caplog):
    write(tmp_path, {"x.jsonl": b"broken\n" * 1000 + json_lines(["one", "two"])})
    split = split_corpus(open_corpus(str(tmp_path)))
    assert split.skipped.count == 1000
    assert len(split.skipped.named) == 20
    assert len(caplog.records) == 21


def test_a_byte_order_mark_before_json_lines_is_no_error(tmp_path):
    write(tmp_path, {"x.jsonl": b"\xef\xbb\xbf" + json_lines(["one", "two"])})
    assert sorted(everything(tmp_path)) == ["one", "two"]


def test_bad_parquet_rows_and_files_are_named_skipped_and_counted(tmp_path):
    invalid = pa.array([b"\xff"]).view(pa.string())
    parquet.write_table(pa.table({"text": pa.chunked_array([["a", None, "b"], invalid])}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"body": ["c"]}), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"text": [1]}), tmp_path / "c.parquet")
    write(tmp_path, {"d.parquet": b"PAR1 but nothing else", "e.txt": "text"})
    split = split_corpus(open_corpus(str(tmp_path)))
    assert sorted(documents(split, "train") + documents(split, "val")) == ["a", "b", "text"]
    assert [what.split(":")[0] for what in split.skipped.named] == [
        "a.parquet, row 2",
        "a.parquet, row 4",
        "b.parquet",
        "c.parquet, row 1",
        "d.parquet",
    ]
    assert "has no column 'text', only ['body']" in split.skipped.named[2]
    assert split.skipped.count == 5


def test_unreadable_files_are_named_skipped_and_counted(tmp_path, caplog):
    write(tmp_path, {"good.txt": "good", "fine.txt": "fine", "latin.txt": "é".encode("latin-1") + b" and more"})
    write(tmp_path, {"late.txt": b"a" * CHUNK_BYTES * 2 + b"\xff", "cut.txt": "é".encode()[:1]})
    write(tmp_path, {"cut.jsonl.gz": gzip.compress(json_lines(TEXTS))[:-20], "no.jsonl.gz": b"no gzip"})
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would never end
    split = split_corpus(open_corpus(str(tmp_path)))
    assert sorted(documents(split, "train") + documents(split, "val")) == ["fine", "good"]
    assert sorted(what.split(":")[0] for what in split.skipped.named) == [
        "broken.txt",
        "cut.jsonl.gz",
        "cut.txt",
        "late.txt",
        "latin.txt",
        "no.jsonl.gz",
        "pipe.txt",
    ]
    assert split.skipped.count == 7
    assert sum("not UTF-8" in what for what in split.skipped.named) == 3
    assert len(caplog.records) == 7


def test_file_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path, {name: "\xe9", "b.txt": "b"})
    (tmp_path / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    split = split_corpus(open_corpus(str(tmp_path)))
    assert sorted(documents(split, "train") + documents(split, "val")) == ["b", "é"]
    assert split.skipped.named[0].startswith("\\udcff.txt: not UTF-8")


def test_a_file_that_breaks_after_the_scan_is_an_error(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    split = split_corpus(open_corpus(str(tmp_path)))
    write(tmp_path, {"a.txt": b"\xff", "b.txt": b"\xff"})
    with pytest.raises(DataError, match="changed while it was read: not UTF-8"):
        list(split.pieces("train"))
