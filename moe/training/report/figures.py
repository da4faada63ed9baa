"""The figures of the page: curves over the steps of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moe.training.report.history import Curve
from moe.training.report.theme import INK, MUTED, SERIES, drawing_style, series_dash, to_svg

_POINTS = 4800  # of all the curves of a figure together, and at most 600 of one: more than a screen can show
_SIZE = (5.6, 2.7)  # inches; the page scales it to half its width
# Fixed, so that the axes of all figures stand in line; the left one has room for ticks such as 0.00125.
_MARGINS = {"left": 0.16, "right": 0.98, "bottom": 0.17, "top": 0.965}


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

    index: int | None = 0
    """Which of the page's colours and dashes it has; None for a yardstick in grey."""

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

    ticks: Formatter = field(default_factory=lambda: FuncFormatter(lambda tick, _: f"{tick:g}"))
    """How the ticks of the vertical axis are written. A formatter serves one axis: do not share it."""

    whole: bool = False
    """Put ticks at whole numbers only."""

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
    lines = [line for line in lines if line.curve]
    if not lines:
        return None
    points = max(60, min(600, _POINTS // len(lines)))
    lines = [replace(line, curve=line.curve.thinned(points)) for line in lines]
    with drawing_style():
        figure = Figure(figsize=_SIZE)
        figure.subplots_adjust(**_MARGINS)
        axes = figure.add_subplot()
        for line in lines:
            _draw_line(axes, line)
        for name, level in references:
            axes.axhline(level, color=MUTED, linestyle=(0, (5, 3)), linewidth=1)
            _draw_name(axes, f"{name} {level:.2f}", level, lines[0].curve)
        _set_axes(axes, chart, lines, [level for _, level in references])
        if any(line.label for line in lines):
            axes.legend(loc="best", labelcolor=INK)
        return Drawing(chart.key, chart.title, chart.note, to_svg(figure, chart.key, f"{chart.title}: {chart.note}"))


def _draw_name(axes: Axes, text: str, level: float, curve: Curve) -> None:
    """Name a level line, at the side where the curve is farther from it."""
    ends = curve.values[np.isfinite(curve.values)]
    left = abs(ends[0] - level) > abs(ends[-1] - level)
    axes.annotate(
        text,
        (0 if left else 1, level),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4 if left else -4, 4),
        textcoords="offset points",
        ha="left" if left else "right",
        color=MUTED,
    )


def _draw_line(axes: Axes, line: Line) -> None:
    points = len(line.curve.steps)
    marker_size = 4.5 if line.dots or points < 4 else 2.5 if points <= 40 else 0  # one point shows by its dot alone
    dash = "dashed" if line.index is None else series_dash(line.index)
    axes.plot(
        line.curve.steps,
        line.curve.values,
        color=MUTED if line.index is None else SERIES[line.index % len(SERIES)],
        linestyle="none" if line.dots else dash,
        marker="o" if marker_size else "none",
        markersize=marker_size,
        markerfacecolor="none" if line.dots else None,
        label=line.label,
        zorder=2.1 if line.index is None else 3,
        clip_on=False,  # a curve along the lower edge would lose half its width
    )


def _set_axes(axes: Axes, chart: Chart, lines: Sequence[Line], levels: Sequence[float]) -> None:
    last = max(1.0, *(float(line.curve.steps[-1]) for line in lines))
    axes.set_xlim(-0.015 * last, 1.015 * last)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(chart.unit)
    axes.yaxis.set_label_coords(-0.16, 0.5)
    values = np.concatenate([*(line.curve.values for line in lines), np.array(levels)])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if chart.logarithmic and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(*_limits(chart, low, high))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=chart.whole))
    axes.yaxis.set_major_formatter(chart.ticks)


def _limits(chart: Chart, low: float, high: float) -> tuple[float, float]:
    """The ends of the vertical axis for values from ``low`` to ``high``."""
    low = low if chart.bottom is None else min(low, chart.bottom)
    high = high if chart.top is None else max(high, chart.top)
    # A curve as good as level is drawn as that, not blown up until its rounding shows.
    missing = (max(chart.span, 0.02 * abs(high)) or 1.0) - (high - low)
    if missing > 0:
        low -= 0 if chart.bottom is not None else missing if chart.top is not None else missing / 2
        high += 0 if chart.top is not None else missing if chart.bottom is not None else missing / 2
    margin = 0.08 * (high - low)
    return (
        low if chart.bottom is not None else low - margin,
        high if chart.top is not None else high + margin,
    )
