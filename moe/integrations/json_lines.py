"""Figures in a file, one line a report."""

import json
import math
from os import PathLike
from pathlib import Path
from typing import final

from moe.integrations.reporter import Figures


@final
class JsonLines:
    """Appends a line ``{"step": ..., <key>: <number>, ...}`` for each report.

    The file is opened and closed for each, so that a killed process leaves every line it wrote. A number that is not
    finite has no JSON form and becomes ``null``. A run that goes on from an earlier step repeats the lines from there
    on: of lines with the same step the last one holds.

    Args:
        path: of the file, which need not exist; its folder is made.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, figures: Figures) -> None:
        """Append one line."""
        numbers = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        line = json.dumps({"step": step, **numbers}, allow_nan=False)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
