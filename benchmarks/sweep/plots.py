"""The plots of the report: small SVG files, readable without telling red from green."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from measure.timing import Spread

from sweep.figures import Estimate, Row, frontier, heat_map

KINDS = {
    "nothing": ("#000000", "s"),
    "loss": ("#0072B2", "o"),
    "bias": ("#D55E00", "^"),
    "loss and bias": ("#CC79A7", "D"),
}
"""Colour (Okabe and Ito 2008) and marker by what balances."""
EVEN_ENOUGH = 0.01
"""MaxVio below which the axis is linear, so that an exact 0 has a place."""
LEVELS = (0.0, 0.1, 0.25, 0.5, 0.8, 1.25, 2.0, 4.0, 8.0)
"""Of a heat map, an even share in the middle; few, so that its picture takes few bytes."""
COLUMNS = 5
"""Heat maps in a row."""


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same data, with text as text."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, dpi=72)


def plot_frontier(rows: Sequence[Row], path: Path) -> None:
    """Bits per byte over MaxVio; numbers are those of the table, names those of the frontier."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    best = frontier(rows)
    for number, row in enumerate(rows, start=1):
        color, marker = KINDS[row.kind]
        x, y = row.figures["evaluation"], row.figures["bits_per_byte"]
        axis.errorbar(x.mean, y.mean, half(y), half(x), fmt="none", ecolor=color, elinewidth=0.7, alpha=0.4)
        axis.plot(x.mean, y.mean, marker, color=color, markerfacecolor=color if row in best else "none", markersize=6)
        label = f"{number} {row.name}" if row in best else str(number)
        axis.annotate(label, (x.mean, y.mean), (5, 4), textcoords="offset points", fontsize=8)
    path_of_best = sorted((row.figures["evaluation"].mean, row.figures["bits_per_byte"].mean) for row in best)
    axis.step(*zip(*path_of_best), where="post", color="#888888", linewidth=0.8, linestyle=":")
    floor = np.mean([row.figures["evaluation_floor"].mean for row in rows])
    axis.axvline(float(floor), color="#888888", linewidth=0.8, linestyle="--")
    axis.annotate(
        "sampling floor", (float(floor), 0.02), (4, 0), ("data", "axes fraction"), "offset points", fontsize=8
    )
    axis.set_xscale("symlog", linthresh=EVEN_ENOUGH)
    axis.set_xlim(left=0)
    axis.set(
        xlabel=f"MaxVio in evaluation mode, whole validation (logarithmic from {EVEN_ENOUGH} on)",
        ylabel="validation, bits per byte",
        title="Quality against balance; filled and named: beaten by none in both",
    )
    axis.grid(alpha=0.3)
    for kind in {row.kind: None for row in rows}:
        color, marker = KINDS[kind]
        axis.plot([], [], marker, color=color, label=f"balanced by {kind}" if kind != "nothing" else "no balance term")
    axis.legend(fontsize=8)
    save(figure, path)


def half(value: Estimate) -> float:
    """Half of an interval, 0 where there is none."""
    return 0.0 if math.isnan(value.half) else value.half


def plot_heat_maps(rows: Sequence[Row], path: Path) -> None:
    """Each expert's load over training, one picture a pair, of its first seed; the busiest at the end is on top."""
    lines = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 1.55 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True, sharey=True)
    colors = mpl.colormaps["PuOr_r"]
    norm = BoundaryNorm(LEVELS, colors.N, extend="max")
    picture = None
    for number, (axis, row) in enumerate(zip(grid.flat, rows)):
        load = heat_map(row.results[0])
        order = np.argsort(-load[:, -1], kind="stable")
        steps = len(row.results[0].steps)
        extent = (0, steps, len(load), 0)
        picture = axis.imshow(
            load[order], cmap=colors, norm=norm, aspect="auto", extent=extent, interpolation="none", rasterized=True
        )
        axis.set_title(row.name.replace(" / ", "\n"), fontsize=8)
        lowest = number >= len(rows) - COLUMNS
        axis.tick_params(labelsize=7, left=number % COLUMNS == 0, bottom=lowest, labelbottom=lowest)  # marks are heavy
    for axis in grid.flat[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("experts of the last layer, by their load at the end", fontsize=9)
    if picture is not None:
        bar = figure.colorbar(picture, ax=grid, shrink=0.6, ticks=LEVELS, aspect=40)
        bar.set_label("load over an even share", fontsize=9)
        bar.ax.set_yticklabels([f"{level:g}" for level in LEVELS], fontsize=7)
    save(figure, path)


def plot_drops(rows: Sequence[Row], path: Path) -> None:
    """What capacities would have dropped, a line a pair."""
    figure, axis = _bars(rows_shown := len(rows))
    places = np.arange(rows_shown)
    for factor, color, offset in ((1.0, "#0072B2", -0.2), (1.25, "#E69F00", 0.2)):
        found = [row.figures[f"drop_{factor}"] for row in rows]
        values, errors = [100 * each.mean for each in found], [100 * half(each) for each in found]
        axis.barh(
            places + offset, values, 0.38, xerr=errors, color=color, label=f"capacity factor {factor}", error_kw=BAR
        )
    axis.set_yticks(places, [f"{number} {row.name}" for number, row in enumerate(rows, start=1)], fontsize=8)
    axis.set(
        xlabel="assignments beyond the capacity, % (last quarter of the steps)", title="What a capacity would drop"
    )
    axis.set_xlim(left=0)
    axis.legend(fontsize=8)
    save(figure, path)


def plot_times(ratios: Mapping[str, Spread], baseline: str, path: Path) -> None:
    """The time of a step over the baseline's, a point a pair with its quartiles."""
    figure, axis = _bars(len(ratios))
    ordered = sorted(ratios.items(), key=lambda item: item[1].median)
    for place, (_, spread) in enumerate(ordered):
        errors = [[spread.median - spread.low], [spread.high - spread.median]]
        axis.errorbar(
            spread.median, place, xerr=errors, fmt="o", color="#0072B2", markersize=4, elinewidth=1, capsize=2
        )
    axis.axvline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axis.set(xlabel=f"time of a step over that of {baseline} (median, quartiles)", title="Time of a training step")
    save(figure, path)


BAR = {"elinewidth": 0.7, "capsize": 1.5}


def _bars(count: int) -> tuple[Figure, Axes]:
    """An empty plot of some lines, the first on top."""
    figure = Figure(figsize=(8, 0.27 * count + 1.3), layout="constrained")
    axis = figure.subplots()
    axis.invert_yaxis()
    axis.set_ylim(count - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    return figure, axis
