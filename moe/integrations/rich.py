"""Figures as a table in the terminal."""

from collections.abc import Mapping
from typing import final

from rich.console import Console
from rich.table import Table

from moe.integrations.reporter import Figures

_COLUMNS: Mapping[str, tuple[str, str]] = {
    "max_vio": ("MaxVio", "{:.3f}"),
    "max_vio_floor": ("floor", "{:.3f}"),
    "cv": ("CV", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "dead_experts": ("dead", "{:.0f}"),
    "drop_rate": ("dropped", "{:.1%}"),
    "confidence": ("confidence", "{:.3f}"),
    "null_rate": ("null", "{:.1%}"),
}
"""Figure -> head of its column, and how a number is written."""


@final
class RichTable:
    """Prints a table for each report, with a row a layer and one for the worst of all.

    Args:
        console: where to print; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()

    def __call__(self, step: int, figures: Figures) -> None:
        """Print one table."""
        rows = _rows(figures)
        columns = [name for name in _COLUMNS if any(name in row for row in rows.values())]
        table = Table(title=f"balance at step {step}", title_justify="left")
        table.add_column("layer")
        for name in columns:
            table.add_column(_COLUMNS[name][0], justify="right")
        for layer, row in rows.items():
            cells = [_COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns]
            table.add_row(layer, *cells, style="bold" if layer == "worst" else None)
        self._console.print(table, markup=False)


def _rows(figures: Figures) -> dict[str, dict[str, float]]:
    """Figures by layer, and those of the worst at the end under its own name."""
    rows: dict[str, dict[str, float]] = {}
    worst: dict[str, float] = {}
    for key, value in figures.items():
        _, figure, layer = key.split("/", 2)
        if figure == "worst":
            worst[layer] = value
        else:
            rows.setdefault(layer, {})[figure] = value
    return {**rows, "worst": worst}
