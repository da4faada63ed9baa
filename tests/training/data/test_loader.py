"""Windows: each once an epoch, in an order that can be taken up again."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import CheckpointError, ConfigError, DataError
from moe.training.data import ByteTokenizer, WindowLoader, eval_batches, target_bytes
from moe.training.data.permutation import Permutation


@given(size=st.integers(1, 5000), seed=st.integers(), epoch=st.integers(0, 100))
def test_permutation_is_a_bijection(size, seed, epoch):
    images = Permutation(size, seed, epoch)(np.arange(size))
    np.testing.assert_array_equal(np.sort(images), np.arange(size))


@given(size=st.integers(1, 2**62), seed=st.integers(), data=st.data())
def test_permutation_of_any_size_stays_inside_and_apart(size, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50)), dtype=np.int64)
    permutation = Permutation(size, seed)
    images = permutation(positions)
    assert ((images >= 0) & (images < size)).all()
    assert len(np.unique(images)) == len(positions)
    for position, image in zip(positions, images):  # alone or in company
        assert permutation(position[None]) == image


def test_permutation_sends_each_position_everywhere_about_equally():
    size, draws = 10, 2000
    images = np.stack([Permutation(size, seed, epoch)(np.arange(size)) for seed in range(4) for epoch in range(500)])
    for position in range(size):
        counts = np.bincount(images[:, position], minlength=size)
        chi2 = ((counts - draws / size) ** 2 / (draws / size)).sum()
        assert chi2 < 33.7  # 9 degrees of freedom: exceeded by chance once in ten thousand


def test_permutation_of_neighbours_is_no_longer_in_order():
    images = Permutation(100_000, seed=1)(np.arange(100_000))
    rises = (np.diff(images) > 0).mean()
    assert abs(rises - 0.5) < 0.01  # standard deviation of a random order: sqrt(1 / 12 / 1e5) = 0.001
    assert abs(np.corrcoef(images, np.arange(100_000))[0, 1]) < 0.02  # 1 / sqrt(1e5) = 0.003


def test_permutation_is_what_it_was_in_every_other_process():
    # written down from a first run: a change here would move the position of every checkpoint
    assert Permutation(10, seed=0)(np.arange(10)).tolist() == [0, 1, 5, 2, 3, 6, 7, 9, 4, 8]
    assert Permutation(10, seed=0, epoch=1)(np.arange(10)).tolist() == [2, 4, 0, 5, 8, 1, 3, 9, 6, 7]


def numbered(count: int) -> np.ndarray:
    """Tokens that are their own positions."""
    return np.arange(count, dtype=np.uint32)


def take(loader: WindowLoader, count: int) -> list[torch.Tensor]:
    return [loader.next_batch()["inputs"] for _ in range(count)]


@settings(max_examples=50)
@given(length=st.integers(2, 200), seq_len=st.integers(1, 20), batch_size=st.integers(1, 7), seed=st.integers(0, 2**40))
def test_an_epoch_is_every_window_once_and_no_target_twice(length, seq_len, batch_size, seed):
    if length <= seq_len:
        length += seq_len
    loader = WindowLoader(numbered(length), seq_len, batch_size, seed)
    rows: list[torch.Tensor] = []
    for _epoch in range(3):
        count = loader.windows_in_epoch
        while len(rows) < count:
            batch = loader.next_batch()
            assert batch["inputs"].shape == batch["targets"].shape == (batch_size, seq_len)
            assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
            assert torch.equal(batch["inputs"] + 1, batch["targets"])
            rows += list(batch["inputs"])
        mine, rows = rows[:count], rows[count:]
        if rows and loader.windows_in_epoch < len(rows):
            return  # a batch of several epochs
        starts = sorted(int(row[0]) for row in mine)
        offset = starts[0]
        assert starts == list(range(offset, length - seq_len, seq_len))
        assert offset < seq_len
        for row in mine:
            assert torch.equal(row, torch.arange(seq_len) + row[0])


def test_epochs_differ_in_order_and_offset():
    loader = WindowLoader(numbered(6400), seq_len=64, batch_size=1, seed=3)
    offsets, orders = set(), set()
    for epoch in range(20):
        assert loader.epoch == epoch
        starts = [int(inputs[0, 0]) for inputs in take(loader, loader.windows_in_epoch)]
        offsets.add(min(starts))
        orders.add(tuple((start - min(starts)) // 64 for start in starts))
    assert len(orders) == 20
    assert len(offsets) > 10  # of 64, drawn 20 times: 17.4 expected
    other = WindowLoader(numbered(6400), seq_len=64, batch_size=1, seed=4)
    assert not torch.equal(torch.cat(take(other, 50)), torch.cat(take(WindowLoader(numbered(6400), 64, 1, 3), 50)))


def test_a_batch_may_be_larger_than_an_epoch():
    loader = WindowLoader(numbered(5), seq_len=4, batch_size=3, seed=0)
    batch = loader.next_batch()
    assert batch["inputs"].tolist() == [[0, 1, 2, 3]] * 3
    assert loader.epoch == 3


@settings(max_examples=50)
@given(
    before=st.integers(0, 30),
    length=st.integers(20, 100),
    seq_len=st.integers(1, 19),
    batch_size=st.integers(1, 9),
)
def test_resuming_gives_the_same_later_batches(before, length, seq_len, batch_size):
    make = lambda: WindowLoader(numbered(length), seq_len, batch_size, seed=7, fingerprint="f")  # noqa: E731
    loader = make()
    take(loader, before)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 12)
    resumed = make()
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, take(resumed, 12), strict=True))
    assert resumed.state_dict() == loader.state_dict()


def test_resuming_with_another_batch_size_loses_no_window():
    loader = WindowLoader(numbered(641), seq_len=64, batch_size=3, seed=0)
    rows = torch.cat(take(loader, 10))
    first = WindowLoader(numbered(641), seq_len=64, batch_size=3, seed=0)
    head = torch.cat(take(first, 2))
    second = WindowLoader(numbered(641), seq_len=64, batch_size=4, seed=0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([head, *take(second, 6)]), rows)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tokens": numbered(101)}, "num_tokens=100, but here num_tokens=101"),
        ({"seq_len": 9}, "seq_len=10, but here seq_len=9"),
        ({"seed": 1}, "seed=0, but here seed=1"),
        ({"fingerprint": "g"}, "fingerprint='f', but here fingerprint='g'"),
    ],
)
def test_a_state_of_something_else(other, message):
    options = {"tokens": numbered(100), "seq_len": 10, "batch_size": 2, "seed": 0, "fingerprint": "f"}
    state = WindowLoader(**options).state_dict()
    loader = WindowLoader(**(options | other))
    before = loader.state_dict()
    with pytest.raises(CheckpointError, match=message):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


@pytest.mark.parametrize("wrong", [{"index": 1000}, {"index": -1}, {"epoch": -1}, {"epoch": None}, {"index": "1"}])
def test_a_state_that_is_no_position(wrong):
    loader = WindowLoader(numbered(100), 10, 2, seed=0)
    before = loader.state_dict()
    with pytest.raises(CheckpointError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))!r}"):
        loader.load_state_dict(before | wrong)
    assert loader.state_dict() == before


@pytest.mark.parametrize("length", [0, 1, 64])
def test_fewer_tokens_than_a_window(length):
    message = f"the split has {length} tokens, fewer than the 65 that seq_len=64 takes"
    with pytest.raises(DataError, match=message):
        WindowLoader(numbered(length), seq_len=64, batch_size=1, seed=0)
    with pytest.raises(DataError, match=message):
        eval_batches(numbered(length), seq_len=64, batch_size=1)


@pytest.mark.parametrize("name", ["seq_len", "batch_size", "max_windows"])
def test_sizes_have_to_be_positive(name):
    options = {"seq_len": 4, "batch_size": 2} | {name: 0}
    with pytest.raises(ConfigError, match=f"{name}=0 is not positive"):
        eval_batches(numbered(100), **options)
    if name != "max_windows":
        with pytest.raises(ConfigError, match=f"{name}=0 is not positive"):
            WindowLoader(numbered(100), **options, seed=0)


@given(length=st.integers(11, 400), batch_size=st.integers(1, 8), max_windows=st.none() | st.integers(1, 50))
def test_eval_windows_are_fixed_apart_and_evenly_spaced(length, batch_size, max_windows):
    tokens = numbered(length)
    batches = list(eval_batches(tokens, 10, batch_size, max_windows))
    assert all(len(batch["inputs"]) == batch_size for batch in batches[:-1])
    inputs = torch.cat([batch["inputs"] for batch in batches])
    assert torch.equal(inputs + 1, torch.cat([batch["targets"] for batch in batches]))
    available = (length - 1) // 10
    assert len(inputs) == min(available, max_windows or available)
    gaps = inputs[:, 0].diff()
    if len(gaps):
        assert gaps.min() >= 10  # no target twice
        assert gaps.max() - gaps.min() <= 10  # even up to one window
    assert inputs[0, 0] == 0
    assert inputs[-1, 0] // 10 >= available - 1 - available / len(inputs)  # to the end
    again = torch.cat([batch["inputs"] for batch in eval_batches(tokens, 10, batch_size, max_windows)])
    assert torch.equal(inputs, again)


def test_target_bytes_count_text_only():
    tokenizer = ByteTokenizer()
    tokens = np.concatenate([[256], tokenizer.encode("é 漢!"), [256], tokenizer.encode("ab")]).astype(np.uint16)
    (batch,) = eval_batches(tokens, seq_len=len(tokens) - 1, batch_size=1)
    assert target_bytes(batch["targets"], tokenizer.token_bytes) == len("é 漢!ab".encode())


def test_only_windows_are_read():
    """Counts the elements that are taken out of the tokens."""
    taken: Counter[str] = Counter()

    class Watched(np.ndarray):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            taken["elements"] += np.size(found)
            return found.view(np.ndarray)

    loader = WindowLoader(numbered(1_000_000).view(Watched), seq_len=16, batch_size=4, seed=0)
    take(loader, 10)
    assert taken["elements"] == 10 * 4 * 17
