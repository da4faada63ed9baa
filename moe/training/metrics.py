"""What a run measures: one JSON object a line, and the same scalars as TensorBoard events."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, final

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from moe.errors import DataError
from moe.training.atomic import replace_text
from moe.training.run_folder import RunFolder

Number: TypeAlias = float | int | None
"""None stands for a number that is not finite, which JSON has no form for."""

Value: TypeAlias = str | Number | Sequence[Number] | Tensor
"""What a key may stand for: a number, a word, a list of numbers, or a tensor of those."""

Plain: TypeAlias = str | Number | list[Number]
"""The same as it is written to a line."""

Record: TypeAlias = dict[str, Plain]
"""One line as it is read back."""

MAX_VIO = "balance/max_vio/"
"""What the key of a layer's load imbalance starts with; the layer's name follows."""

STATUS = "run/status"
"""The key of a run's last line: "finished", "interrupted" or "stopped"."""


class MetricsWriter:
    """Appends lines to a run's ``metrics.jsonl`` and mirrors their numbers into TensorBoard events.

    Each line is handed to the system before ``write`` returns, so a killed process leaves every line it wrote but,
    at worst, a torn last one. A number that is not finite has no JSON form: it is written as ``null`` and left out of
    TensorBoard. Lists and words go to the file alone.

    Write a step's lines before its checkpoint: what is resumed is then exactly what stands in the file.
    """

    def __init__(self, folder: RunFolder, *, resume_step: int | None = None) -> None:
        """Open the log of a run.

        Args:
            folder: the run.
            resume_step: the step of the checkpoint that the run goes on from. Lines of later steps, the word on how
                the run had ended and a torn last line are cut off, so that the file goes on as if nothing had
                happened. None starts an empty log.

        Raises:
            DataError: the log to go on with is damaged elsewhere than in its last line.
        """
        _cut(folder.metrics, resume_step)
        self._file = folder.metrics.open("a", encoding="utf-8", newline="\n")
        # TensorBoard drops what earlier event files say about this step and later ones.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._events = SummaryWriter(log_dir=str(folder.tensorboard), purge_step=purge_step)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line.

        Args:
            step: optimizer steps done, the line's first key.
            values: the other keys. A tensor is turned into numbers, which waits for its device.
        """
        record = {"step": step} | {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._events.add_scalar(key, value, global_step=step)
        # TensorBoard's writer would keep events for two minutes, which a killed run would lose.
        self._events.flush()

    def sync(self) -> None:
        """Force all lines to the disk, so that no checkpoint is newer than the lines of its steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the events."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@final
class NoMetrics:
    """Writes nothing: for all processes of a run but the first."""

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Forget a line."""

    def sync(self) -> None:
        """There is nothing to force to the disk."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_metrics(path: Path) -> list[Record]:
    """Read a log of metrics.

    Args:
        path: a ``metrics.jsonl``. One that does not exist has no lines.

    Returns:
        One dict a line, in order. A last line that was torn when the process died is left out.

    Raises:
        DataError: a line other than the last is not a JSON object with an integer ``step``.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break  # what follows the last line break
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(f"path={str(path)!r}, line {number}: {line[:80]!r} is not a JSON object with a step")
    return records


def record_step(record: Record) -> int:
    """The optimizer steps done when a line was written.

    Args:
        record: a line as ``read_metrics`` returns it.
    """
    step = record["step"]
    assert isinstance(step, int)
    return step


def worst_max_vio(record: Mapping[str, object]) -> tuple[str, float] | None:
    """Find the least balanced layer of a line.

    Args:
        record: one line's keys and values.

    Returns:
        The layer's name and its MaxVio, or None if the line has none.
    """
    found = [
        (value, key.removeprefix(MAX_VIO))
        for key, value in record.items()
        if key.startswith(MAX_VIO) and isinstance(value, int | float)
    ]
    if not found:
        return None
    value, layer = max(found, key=lambda pair: pair[0])  # of equals, the first layer
    return layer, float(value)


def _plain(value: Value) -> Plain:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int | float):
        return _finite(value)
    return [_finite(item) for item in value]


def _finite(value: Number) -> Number:
    return None if value is None or not math.isfinite(value) else value


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _cut(path: Path, resume_step: int | None) -> None:
    """Remove what an uninterrupted run would not have written by ``resume_step``."""
    if resume_step is None:
        replace_text(path, "")
        return
    # Python writes the shortest digits that read back to the same float, so a kept line is written as it was.
    # The word on how the run had ended goes too: the run has not ended any more.
    kept = [record for record in read_metrics(path) if record_step(record) <= resume_step and STATUS not in record]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
