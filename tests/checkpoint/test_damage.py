"""Any damage to any file of a checkpoint is noticed."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe.checkpoint import CheckpointStore, CheckpointWarning, load_model, read_checkpoint
from moe.errors import CheckpointError

FILES = ("SHA256SUMS", "checkpoint.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A store with two good checkpoints."""
    folder = tmp_path_factory.mktemp("template")
    store = CheckpointStore(folder)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # 1e-05 and 1E-05 are the same number, not the same text
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        store.save(step, model, optimizer, {"step": step})
    return folder


def noticed(template: Path, change) -> None:
    """Change the newest of two checkpoints and see that the other is chosen."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(template, Path(temporary) / "store"))
        newest = folder / "step_00000002"
        change(newest)
        with pytest.raises(CheckpointError, match="step_00000002"):
            read_checkpoint(newest)
        with pytest.warns(CheckpointWarning, match="step_00000002"):
            assert CheckpointStore(folder).latest().step == 1


@settings(deadline=None, derandomize=True, max_examples=80)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True))
def test_truncation_is_noticed(template, name, where):
    def truncate(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(where * len(content))])

    noticed(template, truncate)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(template, name, where, bit):
    def flip(checkpoint):
        content = bytearray((checkpoint / name).read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        (checkpoint / name).write_bytes(content)

    noticed(template, flip)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_longer_files_are_noticed(template, name):
    noticed(template, lambda checkpoint: (checkpoint / name).unlink())

    def lengthen(checkpoint):
        with (checkpoint / name).open("ab") as file:
            file.write(b"\n")

    noticed(template, lengthen)


def test_an_empty_folder_is_noticed(template):
    def empty(checkpoint):
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()

    noticed(template, empty)


def test_files_of_two_checkpoints_cannot_be_mixed(template):
    noticed(template, lambda new: shutil.copy(new.parent / "step_00000001" / "checkpoint.json", new))


def test_load_model_verifies(template, tmp_path):
    path = Path(shutil.copytree(template / "step_00000002", tmp_path / "exported"))
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"exported .*model\.safetensors does not have the SHA-256"):
        load_model(path, model)
    assert torch.equal(model.weight, before)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(tmp_path / "nowhere", model)


def test_a_checkpoint_that_goes_away_between_reading_and_loading(template, tmp_path):
    path = Path(shutil.copytree(template / "step_00000002", tmp_path / "gone"))
    checkpoint = read_checkpoint(path)
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="gone"):
        CheckpointStore.load(checkpoint, nn.Linear(3, 2))
