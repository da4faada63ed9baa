"""The pictures of the documentation: for each page the balance over training and the load of each expert, as PNG."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from sweep.figures import Row, flat, heat_map, rows_of
from sweep.job import Job
from sweep.plots import EVEN_ENOUGH
from sweep.report import collect
from sweep.result import Result

PAGES: Mapping[str, Sequence[str]] = {
    "top-k": (
        *("softmax / none", "softmax / squared_deviation", "top_k_softmax / switch"),
        *("sqrt_softplus / score_bias", "sigmoid / lookahead_bias"),
    ),
    "noisy-top-k": ("softmax / none", "noisy_top_k / importance_load"),
    "expert-choice": ("softmax / none", "expert_choice / none"),
    "assignment": ("sinkhorn / none", "base / none"),
    "hash": ("softmax / none", "hash / none"),
    "variable": ("relu / adaptive_l1", "threshold / switch"),
    "null-experts": ("sigmoid / score_bias", "sigmoid_null / score_bias"),
    "share-losses": (
        *("softmax / none", "softmax / squared_deviation", "softmax / switch"),
        *("softmax / switch_sequence", "softmax / device_balance", "sigmoid / switch"),
    ),
    "importance": ("softmax / switch", "noisy_top_k / importance_load"),
    "router-losses": ("softmax / none", "softmax / router_orthogonality"),
    "adaptive-l1": ("softmax / switch", "relu / adaptive_l1"),
    "count-bias": (
        *("sigmoid / none", "sigmoid / score_bias", "sigmoid / score_bias_sequence"),
        *("sigmoid / rms_bias", "sigmoid / momentum_bias"),
    ),
    "quantile-bias": ("sigmoid / none", "sigmoid / score_bias", "sigmoid / quantile_bias"),
    "lookahead-bias": ("sigmoid / rms_bias", "sigmoid / quantile_bias", "sigmoid / lookahead_bias"),
}
"""The pairs that a page shows, by the page's file name."""
STYLES = (
    *(("#000000", "s"), ("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P")),
)
"""Colour (Okabe and Ito 2008) and marker by a pair's place on its page."""
WINDOW = 9
"""Steps of a running median."""
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Of MaxVio."""
COLUMNS = 3
"""Heat maps in a row."""
NOTE = "lines: each batch; grey: all counts together,\nopen training's last quarter, filled evaluation; dotted: chance"
"""Above MaxVio."""
MOST = 8.0
"""Load over the mean load at which a heat map's colours end; below, they end at its inverse."""
LEVELS = 25
"""Its colours; odd, so that one of them is for loads within a tenth of even."""
COLORS = 192
"""Of a picture."""
DPI = 110
WIDTH = 900 / DPI


def write_pictures(job: Job, folder: Path) -> None:
    """Draw each page's picture again from the results of a job's sweep, whatever lies in the folder.

    Args:
        job: one of the sweep.
        folder: of the pictures; ``<page>.png``.
    """
    found, others = collect(job)
    if not found:
        sys.exit(f"{job.root} has no result of these settings ({others} of other settings); train first")
    rows = {row.name: row for row in rows_of(found)}
    folder.mkdir(parents=True, exist_ok=True)
    for page, names in PAGES.items():
        absent = [name for name in names if name not in rows]
        if absent:
            print(f"{page}: no result of {', '.join(absent)}", file=sys.stderr, flush=True)
        if len(absent) < len(names):
            plot_page([rows[name] for name in names if name in rows], folder / f"{page}.png")


def plot_page(rows: Sequence[Row], path: Path) -> None:
    """MaxVio over training on the left, a heat map a pair on the right."""
    figure = Figure(figsize=(WIDTH, 3.5 if len(rows) <= COLUMNS else 4.3), layout="constrained", facecolor="white")
    halves = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 1.15))
    plot_balance(halves[0, 0], rows)
    plot_loads(halves[0, 1], rows)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, which takes a third of the bytes; Pillow comes with matplotlib."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def plot_balance(figure: SubFigure, rows: Sequence[Row]) -> None:
    """A line a pair with the range of its seeds; beside its end what is left when counts are added up."""
    axis = figure.subplots()
    steps = len(rows[0].results[0].steps)
    edge, between = 1.03 * steps, 0.035 * steps
    lowest = math.inf
    for place, ((color, marker), row) in enumerate(zip(STYLES, rows)):
        lines = np.array([running_median(violations(result)) for result in row.results])
        at = np.arange(1, steps + 1)
        axis.fill_between(at, lines.min(0), lines.max(0), color=color, alpha=0.2, linewidth=0)
        every = (steps // 30 * (1 + place), steps // 4 or 1)
        axis.plot(at, lines.mean(0), marker, linestyle="-", color=color, lw=1.2, ms=4, markevery=every, label=row.name)
        x = edge + (place + 1) * between
        ends = row.figures["pooled"].mean, row.figures["evaluation"].mean
        axis.plot([x, x], ends, color=color, linewidth=0.7)
        axis.plot(x, ends[0], marker, color=color, markerfacecolor="white", markersize=5)
        axis.plot(x, ends[1], marker, color=color, markersize=5)
        lowest = min(lowest, float(lines.min()), *ends)
    right = edge + (len(rows) + 1) * between
    axis.axvspan(edge, right, color="#eeeeee", linewidth=0)
    for name, span in {"step_floor": (0, edge), "evaluation_floor": (edge, right)}.items():
        floor = float(np.mean([row.figures[name].mean for row in rows]))
        axis.plot(span, (floor, floor), color="#555555", linewidth=1, linestyle=":")
    scale(axis, lowest)
    axis.set_xlim(0, right)
    axis.set_xticks(np.linspace(0, steps, 4).round())
    axis.tick_params(labelsize=8)
    axis.set_xlabel("training step", fontsize=8)
    axis.set_ylabel("MaxVio: largest load over mean load, less 1", fontsize=8)
    axis.set_title(NOTE, fontsize=8, loc="left")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7.5, frameon=False, handlelength=1.5, columnspacing=1)


def scale(axis: Axes, lowest: float) -> None:
    """Logarithmic, and linear below `EVEN_ENOUGH` where something is lower, so that an exact 0 has a place."""
    if lowest < EVEN_ENOUGH:
        axis.set_yscale("symlog", linthresh=EVEN_ENOUGH)
        axis.set_ylim(bottom=-EVEN_ENOUGH / 5)
        ticks = [0.0, *TICKS]
    else:
        axis.set_yscale("log")
        ticks = list(TICKS)
    bottom, top = axis.get_ylim()
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_ylim(bottom, top)


def plot_loads(figure: SubFigure, rows: Sequence[Row]) -> None:
    """The last layer's load of each pair's first seed, a line an expert; the busiest at the end is on top."""
    lines = math.ceil(len(rows) / COLUMNS)
    columns = math.ceil(len(rows) / lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    look = {"cmap": mpl.colormaps["PuOr_r"].resampled(LEVELS), "norm": LogNorm(1 / MOST, MOST)}
    picture = None
    for axis, row, (color, _) in zip(grid.flat, rows, STYLES):
        load = heat_map(row.results[0])
        order = np.argsort(-load[:, -1], kind="stable")
        extent = (0, len(row.results[0].steps), len(load), 0)
        shown = load[order].clip(1 / MOST, MOST)
        picture = axis.imshow(shown, aspect="auto", extent=extent, interpolation="none", **look)
        axis.set_title(title(row), fontsize=8)
        axis.set_xticks(np.linspace(0, extent[1], 4).round())
        axis.tick_params(labelsize=7)
        axis.spines[:].set(edgecolor=color, linewidth=2)
    for axis in grid.flat[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel("training step", fontsize=8)
    figure.supylabel("experts of the last layer, by load at the end", fontsize=8)
    if picture is not None:
        ticks = [1 / MOST, 0.25, 0.5, 1, 2, 4, MOST]
        bar = figure.colorbar(picture, ax=grid, extend="both", ticks=ticks, aspect=30)
        bar.set_label("load over mean load", fontsize=8)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=7)
        bar.ax.minorticks_off()


def title(row: Row) -> str:
    """The pair, and what a token gets where that is not top_k real experts."""
    experts = row.figures["experts"].mean
    name = row.name.replace(" / ", "\n")
    return name if abs(experts - row.results[0].top_k) < 0.05 else f"{name}\n{experts:.1f} experts a token"


def violations(result: Result) -> np.ndarray:
    """MaxVio of each step, the mean over layers: ``(steps,)``."""
    return np.array([np.mean([float(stats.max_vio) for stats in flat([step])]) for step in result.steps])


def running_median(values: np.ndarray) -> np.ndarray:
    """The median of `WINDOW` values around each; fewer at the ends."""
    reach = WINDOW // 2
    return np.array([np.median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))])
