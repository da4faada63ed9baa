"""The folder of one training run, and how its small files are written."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from moe.errors import ConfigError
from moe.training.atomic import replace_text


@dataclass(frozen=True)
class RunFolder:
    """Where the files of one run lie.

    Example::

        runs/first/
          config.yaml     the resolved settings
          metrics.jsonl   one JSON object a line
          tensorboard/    the same scalars as events
          checkpoints/
          summary.json    what the report needs beside config and metrics
          report.html
    """

    path: Path

    @classmethod
    def open(
        cls, root: Path, name: str | None = None, *, resume: bool = False, now: datetime | None = None
    ) -> "RunFolder":
        """Make the folder of a new run, or go back to that of an earlier one.

        Args:
            root: the folder of all runs; made if missing.
            name: the run's folder below ``root``. None: the date and time, with a number behind it if that is taken.
            resume: whether a folder called ``name`` may exist already; one that does not is made.
            now: the time a nameless run is called after; None asks the clock.

        Returns:
            The folder, with its sub-folders in place.

        Raises:
            ConfigError: ``name`` is not one plain folder name, or exists and ``resume`` is False, or is a file.
        """
        root.mkdir(parents=True, exist_ok=True)
        folder = cls(_make_unnamed(root, now or datetime.now()) if name is None else _make_named(root, name, resume))
        folder.tensorboard.mkdir(exist_ok=True)
        folder.checkpoints.mkdir(exist_ok=True)
        return folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved settings, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """What was measured, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        """What the report needs beside config and metrics, JSON."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The self-contained page about the run."""
        return self.path / "report.html"

    def write_config(self, text: str) -> None:
        """Store the resolved settings.

        Args:
            text: YAML.
        """
        replace_text(self.config, text)


def _make_named(root: Path, name: str, resume: bool) -> Path:
    if name in {"", ".", ".."} or "\0" in name or Path(name).name != name:
        raise ConfigError(f"name={name!r} is not the name of a run: it must be one plain folder name, without '/'")
    path = root / name
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise ConfigError(f"name={name!r}: {path} exists and is not a folder; choose another name") from None
        if not resume:
            raise ConfigError(
                f"name={name!r}: the run folder {path} exists already; choose another name, or set resume=auto"
            ) from None
    return path


def _make_unnamed(root: Path, now: datetime) -> Path:
    # mkdir either makes a folder or fails, so two runs started in the same second cannot get the same one.
    stamp = now.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = root / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
