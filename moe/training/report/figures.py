"""The figures of the page: curves over the steps of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from moe.training.report.history import Curve
from moe.training.report.theme import INK, MUTED, SERIES, drawing_style, series_dash, to_svg

_POINTS = 600
_SIZE = (5.6, 2.7)  # inches; the page scales it to half its width


@dataclass(frozen=True)
class Drawing:
    """A finished figure and the words around it."""

    key: str
    """A word for its ids, unlike any other figure's on the page."""

    title: str
    """What is drawn."""

    note: str
    """How to read it, one sentence."""

    svg: Markup
    """An SVG element."""


@dataclass(frozen=True)
class Line:
    """A curve and how it is drawn."""

    curve: Curve
    """Its points."""

    index: int = 0
    """Which of the page's colours and dashes it has."""

    label: str | None = None
    """Its name in the figure's legend, None for none."""

    dots: bool = False
    """Draw dots only: few measurements beside a line of many."""


@dataclass(frozen=True)
class Chart:
    """The axes of a figure: what is drawn is handed over apart."""

    key: str
    """A word for its ids, unlike any other figure's on the page."""

    title: str
    """What is drawn."""

    note: str
    """How to read it, one sentence."""

    unit: str
    """The label of the vertical axis."""

    bottom: float | None = None
    """Where the vertical axis starts, None to fit the curves."""

    top: float | None = None
    """Where the vertical axis ends, None to fit the curves."""

    span: float = 0.0
    """The least height of the vertical axis, so that rounding is not drawn as a landscape."""

    format: Callable[[float, int], str] | str = "g"
    """How ticks are written: "g", "k" (thousands), "%", "n" (whole numbers), or a function."""

    logarithmic: bool = False
    """Use a logarithmic axis if the values spread over more than a factor of 20."""


def draw(chart: Chart, lines: Sequence[Line], references: Sequence[tuple[str, float]] = ()) -> Drawing | None:
    """Draw curves over the steps of a run.

    Args:
        chart: the axes.
        lines: what is drawn on them; those without a finite value are left out.
        references: level lines for comparison, each with its name.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    lines = [replace(line, curve=line.curve.thinned(_POINTS)) for line in lines if line.curve]
    if not lines:
        return None
    with drawing_style():
        figure = Figure(figsize=_SIZE)
        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        for name, level in references:
            axes.axhline(level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1)
            axes.annotate(
                f"{name} {level:.2f}", (1, level), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                xytext=(0, 3), ha="right", color=MUTED,
            )  # fmt: skip
        _set_axes(axes, chart, lines)
        if any(line.label for line in lines):
            axes.legend(loc="best", labelcolor=INK)
        return Drawing(chart.key, chart.title, chart.note, to_svg(figure, chart.key, f"{chart.title}: {chart.note}"))


def _draw_line(axes: Axes, line: Line) -> None:
    few = len(line.curve.steps) <= 40  # a line of one point is invisible without its dot
    axes.plot(
        line.curve.steps,
        line.curve.values,
        color=SERIES[line.index % len(SERIES)],
        linestyle="none" if line.dots else series_dash(line.index),
        marker="o" if few or line.dots else "none",
        markersize=4.5 if line.dots else 2.5,
        markerfacecolor="none" if line.dots else None,
        label=line.label,
    )


def _set_axes(axes: Axes, chart: Chart, lines: Sequence[Line]) -> None:
    last = max(1.0, *(float(line.curve.steps[-1]) for line in lines))
    axes.set_xlim(-0.015 * last, 1.015 * last)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(chart.unit)
    values = np.concatenate([line.curve.values for line in lines])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if chart.logarithmic and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        _set_limits(axes, chart)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=chart.format == "n"))
    formatters = {"g": FuncFormatter(lambda tick, _: f"{tick:g}"), "k": EngFormatter(sep=""), "%": PercentFormatter(1)}
    formatters["n"] = formatters["g"]
    axes.yaxis.set_major_formatter(
        formatters[chart.format] if isinstance(chart.format, str) else FuncFormatter(chart.format)
    )


def _set_limits(axes: Axes, chart: Chart) -> None:
    bottom, top = axes.get_ylim()
    if top - bottom < chart.span:
        middle = (top + bottom) / 2
        bottom, top = middle - chart.span / 2, middle + chart.span / 2
    if chart.top is not None:
        bottom, top = min(bottom, chart.top - chart.span), chart.top
    if chart.bottom is not None:
        bottom, top = chart.bottom, max(top, chart.bottom + chart.span)
    axes.set_ylim(bottom, top)
