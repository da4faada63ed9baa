"""Which checkpoints a folder holds, keeps and offers."""

import subprocess
import sys
import tracemalloc
import warnings

import pytest
import torch
from torch import nn

from moe.checkpoint import CheckpointStore, CheckpointWarning
from moe.checkpoint.files import locked
from moe.errors import CheckpointError, ConfigError


def names(store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name != ".lock")


def damage(path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_an_empty_store_has_no_latest(tmp_path):
    store = CheckpointStore(tmp_path / "runs" / "a")
    assert store.latest() is None
    assert names(store) == []


def test_save_names_its_folder_and_files(tmp_path, tiny):
    path = CheckpointStore(tmp_path).save(1234, *tiny(), {})
    assert path == tmp_path / "step_00001234"
    assert sorted(file.name for file in path.iterdir()) == [
        "SHA256SUMS",
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
    ]
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1  # all as the umask has it
    check = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_last_ones_are_kept(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 5, 10, 100_000_000):
        store.save(step, *tiny(step), {})
    assert names(store) == ["step_00000010", "step_100000000"]
    assert store.latest().step == 100_000_000


def test_what_was_just_written_is_kept_though_later_steps_are_there(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 5):
        store.save(step, *tiny(), {})
    assert names(store) == ["step_00000005", "step_00000020"]
    one = CheckpointStore(tmp_path, keep=1)
    one.save(3, *tiny(), {})
    assert names(one) == ["step_00000003"]


@pytest.mark.parametrize("reopened", [False, True])
def test_damaged_ones_do_not_count_among_those_kept(tmp_path, tiny, reopened):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, *tiny(), {})
    damage(store.save(2, *tiny(), {}))
    if reopened:
        store = CheckpointStore(tmp_path, keep=2)
    store.save(3, *tiny(), {})
    assert names(store) == ["step_00000001", "step_00000002", "step_00000003"]
    store.save(4, *tiny(), {})
    assert names(store) == ["step_00000003", "step_00000004"]


def test_saving_a_step_again_replaces_it(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, *tiny(1.0), {"n": 1})
    damage(store.save(1, *tiny(2.0), {"n": 2}))
    store.save(1, *tiny(3.0), {"n": 3})
    model = nn.Linear(3, 2)
    assert store.load(store.latest(), model) == {"n": 3}
    assert model.weight.unique().tolist() == [3.0]
    assert names(store) == ["step_00000001"]


def test_latest_passes_over_damaged_ones_and_names_them(tmp_path, tiny):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, *tiny(), {})
    damage(tmp_path / "step_00000003")
    with pytest.warns(CheckpointWarning, match=r"step_00000003 .*model\.safetensors has \d+ bytes where \d+ were"):
        assert store.latest().step == 2
    (tmp_path / "step_00000002" / "SHA256SUMS").unlink()
    with pytest.warns(CheckpointWarning) as caught:
        assert store.latest().step == 1
    assert len(caught) == 2
    damage(tmp_path / "step_00000001")
    with pytest.warns(CheckpointWarning):
        assert store.latest() is None


def test_a_newer_format_is_passed_over(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), {})
    monkeypatch.setattr("moe.checkpoint.record.FORMAT", 2)
    store.save(2, *tiny(), {})
    monkeypatch.undo()
    with pytest.warns(CheckpointWarning, match="its format is 2, this version of moe reads 1"):
        assert store.latest().step == 1


def test_other_things_in_the_folder_are_left_alone(tmp_path, tiny):
    for name in ("notes", "step_1", "step_0000000007", "step_abc", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    store = CheckpointStore(tmp_path, keep=1)
    assert store.latest() is None
    store.save(1, *tiny(), {})
    store.save(2, *tiny(), {})
    assert store.latest().step == 2
    others = {"notes", "step_1", "step_0000000007", "step_abc", "best", "step_00000009"}
    assert set(names(store)) == {"step_00000002"} | others


def test_leftovers_of_dead_runs_are_removed_at_the_start(tmp_path, tiny):
    path = CheckpointStore(tmp_path).save(2, *tiny(), {"n": 2})
    for name in (".writing-step_00000003", ".removing-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    # Killed between the two renames of a replacement: the old one is put back.
    path.rename(tmp_path / ".replaced-step_00000002")
    store = CheckpointStore(tmp_path)
    assert names(store) == ["step_00000002"]
    assert store.latest().state == {"n": 2}
    # Killed after them: it is deleted.
    (tmp_path / ".replaced-step_00000002").mkdir()
    assert names(CheckpointStore(tmp_path)) == ["step_00000002"]


def test_a_live_writer_is_left_alone(tmp_path):
    CheckpointStore(tmp_path)
    (tmp_path / ".writing-step_00000003").mkdir()
    with locked(tmp_path / ".lock", wait=True):
        CheckpointStore(tmp_path)
        assert (tmp_path / ".writing-step_00000003").exists()
    CheckpointStore(tmp_path)
    assert not (tmp_path / ".writing-step_00000003").exists()


def test_a_checkpoint_that_cannot_be_deleted_is_warned_of(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, *tiny(), {})

    def refuse(path):
        raise PermissionError(13, "not yours", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.warns(CheckpointWarning, match="step_00000001 cannot be deleted"):
        store.save(2, *tiny(), {})
    monkeypatch.undo()
    assert store.latest().step == 2
    CheckpointStore(tmp_path)
    assert names(store) == ["step_00000002"]


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_must_be_positive(tmp_path, keep):
    with pytest.raises(ConfigError, match=f"keep={keep}"):
        CheckpointStore(tmp_path, keep=keep)


def test_step_must_not_be_negative(tmp_path, tiny):
    with pytest.raises(ConfigError, match="step=-1"):
        CheckpointStore(tmp_path).save(-1, *tiny(), {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        CheckpointStore(tmp_path / "file")


def test_files_are_verified_in_pieces(tmp_path):
    size = 32 * 2**20
    model = nn.Linear(2**10, size // 2**12, bias=False)
    store = CheckpointStore(tmp_path)
    store.save(1, model, torch.optim.SGD(model.parameters()), {})
    tracemalloc.start()
    assert store.latest().step == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 16


def test_no_warning_where_nothing_is_wrong(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            store.save(step, *tiny(), {})
        assert store.latest().step == 3


def test_missing_safetensors_says_what_to_install():
    script = "import sys; sys.modules['safetensors'] = None; import moe; import moe.checkpoint"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "ImportError: moe.checkpoint needs the package safetensors: pip install 'moe-torch[train]'" in run.stderr
