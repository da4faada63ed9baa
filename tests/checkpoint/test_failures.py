"""Full disks, killed processes: the former checkpoint is whole, and nothing half-written is left."""

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointStore, read_checkpoint
from moe.checkpoint import files as checkpoint_files
from moe.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def fail_at(monkeypatch, owner, name: str, call: int) -> None:
    """Let a function write half of what it should and then find the disk full, the ``call``-th time it is called."""
    whole, calls = getattr(owner, name), itertools.count(1)

    def full(*args, **kwargs):
        if next(calls) != call:
            return whole(*args, **kwargs)
        if name == "save_file":
            Path(args[1]).write_bytes(b"half")
        if name == "write_bytes":
            whole(args[0], args[1][: len(args[1]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)


STAGES = [
    *[(checkpoint_files, "save_file", call, "safetensors") for call in (1, 2, 3)],
    (Path, "write_bytes", 1, "checkpoint.json"),
    (Path, "write_bytes", 2, "SHA256SUMS"),
    *[(os, "fsync", call, "") for call in range(1, 7)],
    (os, "mkdir", 1, ""),
    (os, "rename", 1, ""),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[1]}-{stage[2]}")
@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_a_full_disk_leaves_the_former_checkpoint_whole(tmp_path, tiny, monkeypatch, stage, step):
    owner, name, call, named = stage
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, *tiny(1.0), {"n": 1})
    fail_at(monkeypatch, owner, name, call)
    with pytest.raises(CheckpointError) as caught:
        store.save(step, *tiny(2.0), {"n": 2})
    monkeypatch.undo()
    message = str(caught.value)
    assert f"step {step} cannot be saved in {tmp_path}" in message
    assert "No space left on device" in message
    assert f"the last good checkpoint is {tmp_path / 'step_00000001'}" in message
    assert named in message
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert names(tmp_path) == ["step_00000001"]
    assert store.latest().state == {"n": 1}
    store.save(step, *tiny(3.0), {"n": 3})
    assert store.latest().state == {"n": 3}


def test_a_full_disk_between_the_renames_of_a_replacement(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), {"n": 1})
    fail_at(monkeypatch, os, "rename", 2)
    with pytest.raises(CheckpointError, match=r"last good checkpoint is .*step_00000001"):
        store.save(1, *tiny(), {"n": 2})
    assert names(tmp_path) == ["step_00000001"]
    assert store.latest().state == {"n": 1}


def test_the_first_checkpoint_of_all_fails(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path)
    fail_at(monkeypatch, os, "fsync", 1)
    with pytest.raises(CheckpointError, match="there is no good checkpoint in it"):
        store.save(1, *tiny(), {})
    assert names(tmp_path) == []


def test_the_last_good_checkpoint_named_is_a_good_one(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), {})
    (store.save(2, *tiny(), {}) / "rng.safetensors").write_bytes(b"")
    fail_at(monkeypatch, os, "fsync", 1)
    with pytest.raises(CheckpointError, match=r"the last good checkpoint is .*step_00000001"):
        store.save(3, *tiny(), {})


def test_a_folder_that_went_away_is_named(tmp_path, tiny):
    store = CheckpointStore(tmp_path / "gone")
    (tmp_path / "gone" / ".lock").unlink()
    (tmp_path / "gone").rmdir()
    with pytest.raises(CheckpointError, match="gone"):
        store.save(1, *tiny(), {})


def test_an_interrupt_leaves_nothing_behind_and_stays_an_interrupt(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, *tiny(), {})

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.save(2, *tiny(), {})
    assert names(tmp_path) == ["step_00000001"]


def test_every_file_and_folder_is_forced_to_the_disk_before_it_is_renamed(tmp_path, tiny, monkeypatch):
    store, events = CheckpointStore(tmp_path), []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def record_rename(old, new):
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    store.save(1, *tiny(), {})
    *written, draft, renamed, parent = events
    assert sorted(written) == sorted([*checkpoint_files.FILES, "SHA256SUMS"])
    assert (draft, renamed, parent) == (".writing-step_00000001", "rename", tmp_path.name)


COMMON = """
import errno, os, resource, signal, sys, warnings
from pathlib import Path
import torch
from torch import nn
from moe.checkpoint import CheckpointStore, read_checkpoint
from moe.errors import CheckpointError
warnings.simplefilter("error")
torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(64)).sum().backward()
optimizer.step()
"""

# The kernel itself refuses to write more than the limit: EFBIG, as no one can be sure to have a full disk at hand.
LIMITED = """
store = CheckpointStore(folder)
store.save(1, model, optimizer, {"n": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in (0, 2000, 17000):  # nothing, part of the model, all of the model but not of the optimizer
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        store.save(2, model, optimizer, {})
    except CheckpointError as error:
        assert "File too large" in str(error), error
        assert "step_00000001" in str(error), error
        assert ("optimizer" if limit == 17000 else "model") + ".safetensors" in str(error), error
    else:
        raise AssertionError(limit)
    assert sorted(os.listdir(folder)) == [".lock", "step_00000001"], os.listdir(folder)
    assert store.latest().state == {"n": 1}
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
store.save(2, model, optimizer, {})
assert store.latest().step == 2
"""

# Dies in front of the n-th call that changes the file system, for every n there is.
KILLED_EVERYWHERE = """
import shutil
template = folder / "template"
store = CheckpointStore(template, keep=2)
for step in (1, 2, 3):
    store.save(step, model, optimizer, {"n": step})

def until(last):
    calls = 0
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))

deaths = 0
outcomes = set()
while True:
    place = folder / str(deaths)
    shutil.copytree(template, place)
    child = os.fork()
    if child == 0:
        until(deaths + 1)
        dying = CheckpointStore(place, keep=2)
        dying.save(3, model, optimizer, {"n": 33})  # replaces
        dying.save(4, model, optimizer, {"n": 4})  # prunes
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    for checkpoint in place.glob("step_*"):
        read_checkpoint(checkpoint)  # before anybody swept: whole or not there
    store = CheckpointStore(place, keep=2)
    kept = sorted(os.listdir(place))
    assert kept[0] == ".lock" and all(name.startswith("step_") for name in kept[1:]), kept
    newest = store.latest()
    outcomes.add(newest.state["n"])
    store.load(newest, model, optimizer)
    store.save(5, model, optimizer, {})
    assert store.latest().step == 5
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    deaths += 1
print(deaths, sorted(outcomes))
"""

SAVES_FOR_EVER = """
store = CheckpointStore(folder, keep=2)
step = 0
while True:
    step += 1
    store.save(step, model, optimizer, {"n": step})
    print(step, flush=True)
"""


def python(script: str, folder: Path) -> list[str]:
    return [sys.executable, "-c", COMMON + script, str(folder)]


def run(script: str, folder: Path) -> str:
    done = subprocess.run(python(script, folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_real_limit_on_file_size(tmp_path):
    run(LIMITED, tmp_path)


@pytest.mark.slow
def test_death_in_front_of_every_change_of_the_file_system(tmp_path):
    deaths, outcomes = run(KILLED_EVERYWHERE, tmp_path).split(maxsplit=1)
    assert outcomes.strip() == "[3, 4, 33]"
    # Two saves of seven fsyncs, a mkdir and a rename; one more rename and seven deletions each to replace and to prune.
    assert int(deaths) >= 2 * (7 + 1 + 1 + 1 + 6)


@pytest.mark.parametrize("lines", [1, 6])
def test_a_killed_process_leaves_a_good_store(tmp_path, lines):
    with subprocess.Popen(python(SAVES_FOR_EVER, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        for _ in range(lines):
            last = int(process.stdout.readline())
        process.kill()
    for path in tmp_path.glob("step_*"):
        read_checkpoint(path)
    store = CheckpointStore(tmp_path, keep=2)
    newest = store.latest()
    assert newest.step >= last
    assert newest.state == {"n": newest.step}
    assert len(names(tmp_path)) <= 3
    model = torch.nn.Linear(64, 64)
    store.load(newest, model, torch.optim.AdamW(model.parameters()))
