"""Which files a corpus has."""

import os
import sysconfig
from pathlib import Path

import pytest

from moe.errors import DataError
from moe.training.data.corpus import open_corpus
from moe.training.data.split import split_corpus
from tests.training.data.corpora import json_lines, write


def test_stdlib_is_the_default_and_has_no_installed_packages():
    corpus = open_corpus()
    assert corpus == open_corpus("stdlib")
    assert corpus.root == Path(sysconfig.get_path("stdlib"))
    names = [source.name for source in corpus.sources]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name or not name.endswith(".py")]


def test_folder_takes_known_endings_in_order_and_leaves_hidden_names_out(tmp_path):
    write(tmp_path, {"b/z.txt": "z", "a.md": "a", "B.TXT": "B", "c.bin": "c", ".hidden.txt": "h", ".git/x.txt": "x"})
    corpus = open_corpus(str(tmp_path))
    assert [source.name for source in corpus.sources] == ["B.TXT", "a.md", "b/z.txt"]


def test_glob_takes_any_ending_and_names_do_not_depend_on_what_matches(tmp_path):
    write(tmp_path, {"deep/er/one.log": "1", "deep/two.log": "2", "deep/three.txt": "3", "deep/folder.log/x.txt": "4"})
    corpus = open_corpus(str(tmp_path / "deep" / "**" / "*.log"))
    assert [source.name for source in corpus.sources] == ["er/one.log", "two.log"]
    (tmp_path / "deep/two.log").unlink()
    corpus = open_corpus(str(tmp_path / "deep" / "**" / "*.log"))
    assert [source.name for source in corpus.sources] == ["er/one.log"]


def test_relative_glob(tmp_path, monkeypatch):
    write(tmp_path, {"x/one.txt": "1", "two.txt": "2"})
    monkeypatch.chdir(tmp_path)
    assert [source.name for source in open_corpus("**/*.txt").sources] == ["two.txt", "x/one.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    write(tmp_path, {"a[1].txt": "text", "a1.txt": "other"})
    assert [source.name for source in open_corpus(str(tmp_path / "a[1].txt")).sources] == ["a[1].txt"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a", "b.txt": "b", "closed/c.txt": "c"})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_corpus(str(tmp_path)).unreadable == ("closed: a folder that cannot be listed",)


def test_no_permission_is_found_out_before_reading(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.txt")  # root may read everything
    corpus = open_corpus(str(tmp_path))
    assert corpus.unreadable == ("a.txt: no permission to read it",)
    assert [source.name for source in corpus.sources] == ["b.txt"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "missing", "missing' does not exist"),
        ({}, "", "path='' names nothing"),
        ({}, ".", "holds no readable file with one of the endings .txt"),
        ({"a.bin": "x"}, ".", "holds no readable file"),
        ({"a.txt": "x"}, "*.log", "holds no readable file"),
        ({"a.txt": "", "b.txt": ""}, ".", r"has no text: 2 file\(s\)"),
        ({"a.txt": b"\xff"}, ".", "has no text.*1 skipped, among them a.txt: not UTF-8"),
        (
            {"a.jsonl": '{"body": "x"}\n'},
            ".",
            "text_field='text'.*a.jsonl, line 1: has no field 'text'",
        ),
        ({"a.txt": "x"}, "a.txt", r"a.txt has 1 byte\(s\), too few to cut"),
        ({"a.jsonl": json_lines(["x"])}, "a.jsonl", "a.jsonl has one document"),
    ],
)
def test_nothing_to_read_is_an_error_that_names_the_path(tmp_path, files, path, message):
    write(tmp_path, files)
    with pytest.raises(DataError, match=message):
        split_corpus(open_corpus(str(tmp_path / path) if path else path))


def test_only_unreadable_files(tmp_path):
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no readable file; unreadable: broken\.txt: No such file"):
        open_corpus(str(tmp_path / "broken.txt"))
