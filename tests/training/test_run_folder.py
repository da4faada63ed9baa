import os
from datetime import datetime
from pathlib import Path

import pytest

from moe.errors import ConfigError
from moe.training.atomic import replace_text
from moe.training.run_folder import RunFolder


def test_named_run_has_its_paths_below_its_name(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "runs", "first")
    assert folder.path == tmp_path / "runs" / "first"
    assert folder.name == "first"
    paths = (folder.config, folder.metrics, folder.tensorboard, folder.checkpoints, folder.summary, folder.report)
    names = ["config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json", "report.html"]
    assert [path.relative_to(folder.path).as_posix() for path in paths] == names
    assert folder.tensorboard.is_dir()
    assert folder.checkpoints.is_dir()


def test_nameless_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    now = datetime(2026, 8, 9, 7, 5, 3)
    names = [RunFolder.open(tmp_path, now=now).name for _ in range(3)]
    assert names == ["2026-08-09_07-05-03", "2026-08-09_07-05-03_2", "2026-08-09_07-05-03_3"]


def test_existing_name_is_an_error_without_resume(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "first").write_config("seed: 0\n")
    with pytest.raises(ConfigError, match=r"name='first'.*exists already.*resume=auto"):
        RunFolder.open(tmp_path, "first")
    assert RunFolder.open(tmp_path, "first", resume=True).config.read_text() == "seed: 0\n"


def test_resume_makes_a_folder_that_is_missing(tmp_path: Path) -> None:
    assert RunFolder.open(tmp_path, "new", resume=True).checkpoints.is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/absolute", "a/", "nul\0"])
def test_name_that_would_leave_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="one plain folder name"):
        RunFolder.open(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_name_of_a_file(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        RunFolder.open(tmp_path, "taken", resume=resume)


def test_failed_write_leaves_the_old_text_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
