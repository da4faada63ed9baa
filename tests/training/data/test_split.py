"""Which documents are for validation."""

import pytest

from moe.errors import ConfigError
from moe.training.data.corpus import open_corpus
from moe.training.data.split import split_corpus
from tests.training.data.corpora import documents, json_lines, write


def test_one_text_is_cut_after_a_line_with_the_tail_for_validation(tmp_path):
    lines = [f"line {i} é\n" for i in range(1000)]
    write(tmp_path, {"big.txt": "".join(lines)})
    split = split_corpus(open_corpus(str(tmp_path / "big.txt")), val_fraction=0.1)
    train, val = documents(split, "train"), documents(split, "val")
    assert len(train) == len(val) == 1
    assert train[0] + val[0] == "".join(lines)
    assert train[0].endswith("\n")
    size = len("".join(lines).encode())
    assert 0 <= len(train[0].encode()) - 0.9 * size < len("line 100 é\n".encode())


@pytest.mark.parametrize("text", ["ab", "é漢", "漢" * 50, "no newline but the last one\n"])
def test_one_text_without_lines_is_cut_between_characters(tmp_path, text):
    write(tmp_path, {"big.txt": text})
    split = split_corpus(open_corpus(str(tmp_path / "big.txt")), val_fraction=0.4)
    (train,), (val,) = documents(split, "train"), documents(split, "val")
    assert train + val == text


def test_adding_a_file_moves_no_other(tmp_path):
    write(tmp_path, {f"{i}.txt": f"text {i}" for i in range(200)})
    before = split_corpus(open_corpus(str(tmp_path)), val_fraction=0.1)
    write(tmp_path, {f"0/new {i}.txt": f"new {i}" for i in range(50)})
    after = split_corpus(open_corpus(str(tmp_path)), val_fraction=0.1)
    for name in ("train", "val"):
        assert set(documents(before, name)) <= set(documents(after, name))
    # 200 draws at 0.1: 20 expected, standard deviation 4.2, five of them allowed
    assert 0 < len(documents(before, "val")) < 42


def test_splits_of_files_and_records_are_what_they_were_in_every_other_process(tmp_path):
    write(tmp_path, {f"{i}.txt": f"text {i}" for i in range(30)})
    write(tmp_path, {"records/r.jsonl": json_lines([f"text {i}" for i in range(30)])})
    files = split_corpus(open_corpus(str(tmp_path / "*.txt")), val_fraction=0.1)
    records = split_corpus(open_corpus(str(tmp_path / "records")), val_fraction=0.1)
    # written down from a first run: a change here moves validation text of existing corpora into training
    assert documents(files, "val") == ["text 14"]
    assert documents(records, "val") == ["text 2", "text 3", "text 6", "text 18"]


def test_records_keep_their_side_when_others_are_added_in_front(tmp_path):
    texts = [f"text {i}" for i in range(100)]
    write(tmp_path, {"a.jsonl": json_lines(texts), "b.jsonl": json_lines(["new 1", "new 2", *texts])})
    before = split_corpus(open_corpus(str(tmp_path / "a.jsonl")), val_fraction=0.2)
    after = split_corpus(open_corpus(str(tmp_path / "b.jsonl")), val_fraction=0.2)
    for name in ("train", "val"):
        assert set(documents(before, name)) <= set(documents(after, name))


@pytest.mark.parametrize("val_fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("kind", ["files", "records", "same records"])
def test_each_split_gets_something(tmp_path, val_fraction, kind):
    if kind == "files":
        write(tmp_path, {"a.txt": "a", "b.txt": "b", "c.txt": "c"})
    else:
        write(tmp_path, {"a.jsonl": json_lines(["a", "b", "c"] if kind == "records" else ["a", "a", "a"])})
    split = split_corpus(open_corpus(str(tmp_path)), val_fraction)
    train, val = documents(split, "train"), documents(split, "val")
    assert train
    assert val
    assert len(train) + len(val) == 3
    if val_fraction < 0.1:
        assert len(val) == 1
    if val_fraction > 0.9:
        assert len(train) == 1


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, float("nan")])
def test_val_fraction_out_of_range(tmp_path, val_fraction):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    with pytest.raises(ConfigError, match=f"val_fraction={val_fraction}"):
        split_corpus(open_corpus(str(tmp_path)), val_fraction)
