"""A folder of checkpoints, of which the newest good one can always be found."""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from moe.checkpoint.files import FILES, SUMS, CheckpointWarning, locked, sync
from moe.checkpoint.loading import load_checkpoint
from moe.checkpoint.record import Checkpoint, read_checkpoint, write_checkpoint
from moe.errors import CheckpointError, ConfigError

_LOCK = ".lock"
# Folders under these names are no checkpoints: not yet, not any more, or until the one that takes its place is there.
_WRITING, _REMOVING, _REPLACED = ".writing-", ".removing-", ".replaced-"


@final
class CheckpointStore:
    """Saves checkpoints into one folder, keeps the last few, and finds the newest that is whole.

    At any instant, that of a SIGKILL or of a power failure included, a folder ``step_...`` is a whole checkpoint:
    it is written under another name, forced to the disk, and renamed. Saves of several processes wait for each other.
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        """Open a store, and delete what dead runs left half-written in it.

        Args:
            folder: where the checkpoints are; made if it is not there.
            keep: how many checkpoints to keep, at least 1.

        Raises:
            ConfigError: ``keep`` is not positive.
            CheckpointError: the folder cannot be made or written to.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep} is not positive: the checkpoint just written is always kept")
        self.folder = Path(folder)
        self.keep = keep
        self._verified: dict[Path, tuple[tuple[int, ...], ...]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / _LOCK, wait=False) as held:
                if held:  # else a live process is writing, and the half-written folder is its own
                    self._sweep()
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {self.folder} cannot be used: {error}") from error

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, whole or not at all, then delete those that are older than the last ``keep`` good ones.

        The state of the global random generators (torch with CUDA, numpy, Python) is saved with it. Waits for the
        device and for the disk. One process of a distributed run calls it.

        Args:
            step: optimizer steps done, 0 or more; a checkpoint of the same step is replaced.
            model: its ``state_dict`` must hold tensors only; tied tensors are stored once.
            optimizer: over parameters of ``model``.
            state: what else the caller needs to go on: None, bool, int, float, str, and lists, tuples and dicts from
                str of such. It comes back as it was.

        Returns:
            The folder of the checkpoint, ``step_00001234``.

        Raises:
            ConfigError: ``step`` is negative.
            CheckpointError: something cannot be stored, or writing failed (a full disk). Nothing half-written is left,
                and the message names the last good checkpoint.
        """
        if step < 0:
            raise ConfigError(f"step={step} is negative")
        path = self.folder / f"step_{step:08d}"
        try:
            with locked(self.folder / _LOCK, wait=True):
                self._sweep()
                try:
                    self._write(path, step, model, optimizer, state)
                    self._prune(path)
                finally:
                    self._sweep()
        except Exception as error:
            reason = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
            good = next((old for old in self._folders() if self._is_good(old)), None)
            last = f"the last good checkpoint is {good}" if good else "there is no good checkpoint in it"
            raise CheckpointError(f"step {step} cannot be saved in {self.folder}: {reason}; {last}") from error
        return path

    def latest(self) -> Checkpoint | None:
        """Find the newest checkpoint whose files are those that were written.

        A damaged one is passed over with a ``CheckpointWarning`` that says what is wrong with it.

        Returns:
            The checkpoint with the highest step that is whole, or None where there is none.
        """
        for path in self._folders():
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                warnings.warn(f"passing over a damaged checkpoint: {error}", CheckpointWarning, stacklevel=2)
        return None

    @staticmethod
    def load(
        checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> Mapping[str, Any]:
        """Load a model, an optimizer and the global random generators, so that training goes on bit for bit.

        Args:
            checkpoint: from ``latest`` or ``read_checkpoint``.
            model: of the same architecture, on any device.
            optimizer: of the same class, over the same parameters in the same groups; None leaves it out.

        Returns:
            The ``state`` that was saved.

        Raises:
            CheckpointError: tensors of the model are missing, unexpected, or of another shape or dtype (the message
                names them), or the optimizer does not fit. Nothing is changed then.
        """
        return load_checkpoint(checkpoint, model, optimizer)

    def _write(
        self, path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Write beside the final place, force it to the disk, and rename."""
        draft = self.folder / f"{_WRITING}{path.name}"
        draft.mkdir()
        write_checkpoint(draft, step, model, optimizer, state)
        sync(draft)
        if path.exists():  # a folder can only be renamed to a name that is free
            path.rename(self.folder / f"{_REPLACED}{path.name}")
        draft.rename(path)
        sync(self.folder)
        self._verified[path] = _stamp(path)

    def _sweep(self) -> None:
        """Delete half-written and half-deleted folders; put one back that was moved for a successor that never came."""
        for path in sorted(self.folder.iterdir()):
            place = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not place.exists():
                path.rename(place)
            elif path.name.startswith((_WRITING, _REMOVING, _REPLACED)):
                with _deleting(path):
                    shutil.rmtree(path)

    def _prune(self, written: Path) -> None:
        """Condemn checkpoints older than the last ``keep`` good ones, of which ``written`` is one.

        They are renamed, and the next sweep deletes them: a half-deleted folder never passes for a damaged checkpoint.
        """
        good = 1  # written
        for path in self._folders():
            if path == written:
                continue
            if good < self.keep:
                good += self._is_good(path)
                continue
            with _deleting(path):
                path.rename(self.folder / f"{_REMOVING}{path.name}")

    def _folders(self) -> list[Path]:
        """The folders that are named like checkpoints, highest step first."""
        steps: dict[Path, int] = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = re.fullmatch(r"step_(\d{8}|[1-9]\d{8,})", path.name)
            if match and path.is_dir():
                steps[path] = int(match[1])
        return sorted(steps, key=lambda path: steps[path], reverse=True)

    def _is_good(self, path: Path) -> bool:
        """Whether a checkpoint is whole; its checksums are computed once, and again when its files have changed."""
        try:
            stamp = _stamp(path)
            if self._verified.get(path) != stamp:
                read_checkpoint(path)
                self._verified[path] = stamp
        except (CheckpointError, OSError):
            return False
        return True


@contextmanager
def _deleting(path: Path) -> Iterator[None]:
    """Warn of a folder that cannot be deleted, and let it be: what was saved is saved."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{path} cannot be deleted: {error}", CheckpointWarning, stacklevel=3)


def _stamp(path: Path) -> tuple[tuple[int, ...], ...]:
    """What changes when somebody writes to a checkpoint's files."""
    stats = [(path / name).stat() for name in (*FILES, SUMS)]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
