"""What a verification found, as a record and as text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

GRADIENT, PARAMETER = "gradient", "parameter"


@final
@dataclass(frozen=True)
class Row:
    """One comparison of the ranks with the reference."""

    quantity: str
    """"loss", "gradient", "gradient norm", "clip factor", "expert counts", "selection bias" or "parameter"."""
    name: str
    """Of the parameter or layer; empty for what belongs to the whole model."""
    step: int
    """From 1."""
    error: float
    """Largest difference, relative to the size of what is compared."""
    disagreement: float
    """Largest difference between two ranks that should hold the same, likewise relative."""
    tolerance: float
    """What both may be at most."""

    @property
    def ok(self) -> bool:
        """Whether it passes; a NaN does not."""
        return self.error <= self.tolerance and self.disagreement <= self.tolerance

    def __str__(self) -> str:
        of = f" of {self.name}" if self.name else ""
        if self.error <= self.tolerance:
            return (
                f"{self.quantity}{of}, in step {self.step}: ranks that should hold the same differ by "
                f"{self.disagreement:.1e} (at most {self.tolerance:.0e} is allowed)"
            )
        return (
            f"{self.quantity}{of}, in step {self.step}, by {self.error:.1e} (at most {self.tolerance:.0e} is allowed)"
        )


@final
@dataclass(frozen=True)
class Report:
    """The outcome of a verification.

    Attributes:
        title: what was compared.
        rows: every comparison, in the order in which a run comes to them.
        routing: how uneven the routing was, a line a layer.
        fault: what was planted.
    """

    title: str
    rows: tuple[Row, ...]
    routing: tuple[str, ...]
    fault: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return all(row.ok for row in self.rows)

    @property
    def first(self) -> Row | None:
        """The first comparison that fails."""
        return next((row for row in self.rows if not row.ok), None)

    @property
    def first_parameter(self) -> Row | None:
        """The first parameter that differs, by its gradient or by its value."""
        return next((row for row in self.rows if not row.ok and row.quantity in (GRADIENT, PARAMETER)), None)

    def table(self) -> str:
        """A line for each quantity and name, with its worst step."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.quantity, row.name), []).append(row)
        worst = [max(rows, key=lambda row: (not row.ok, row.error, row.disagreement)) for rows in groups.values()]
        head = ("quantity", "of", "worst step", "error", "between ranks", "")
        cells = [
            (r.quantity, r.name, str(r.step), f"{r.error:.1e}", f"{r.disagreement:.1e}", _verdict(r)) for r in worst
        ]
        return "\n".join(_columns([head, *cells]))

    def summary(self) -> str:
        """What was proved, or what differs first."""
        if self.ok:
            unlimited = any(row.tolerance == float("inf") for row in self.rows)
            end = "reported only, no tolerance was given" if unlimited else "all within tolerance"
            return f"OK: {self.title}: {len(self.rows)} comparisons, {end}"
        failed = sum(not row.ok for row in self.rows)
        lines = [f"DIFFERS: {self.title}: {failed} of {len(self.rows)} comparisons"]
        lines.append(f"first difference: {self.first}")
        lines.append(f"first parameter that differs: {self.first_parameter or 'none'}")
        return "\n".join(lines)

    def __str__(self) -> str:
        planted = [] if self.fault is None else [f"planted fault: {self.fault}"]
        return "\n".join([self.table(), *self.routing, *planted, self.summary()])


def _verdict(row: Row) -> str:
    return "ok" if row.ok else "DIFFERS"


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
