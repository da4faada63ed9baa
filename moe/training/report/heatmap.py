"""The load of each expert of a layer over time, as a map of colours."""

import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from moe.training.report.figures import Drawing
from moe.training.report.history import Loads
from moe.training.report.theme import drawing_style, to_svg

_PIXELS = 700_000  # of all the maps of a page together, which keeps it below two megabytes

_FEW, _MANY = (0.10, 0.37, 0.86), (0.86, 0.25, 0.02)  # blue, orange


def _colours() -> ListedColormap:
    """From few tokens over an even share to many.

    The middle is transparent, so that it is the page's own background and one picture suits a light page and a dark
    one. 65 steps are as many as an eye tells apart, and keep the picture small.
    """
    way = np.linspace(-1, 1, 65)
    rgb = np.where(way[:, None] < 0, _FEW, _MANY)
    return ListedColormap(np.column_stack([rgb, np.abs(way)]))


def draw_load(key: str, layer: str, loads: Loads, half_range: float, experts_on_page: int) -> Drawing:
    """Draw the load of each expert of a layer over time.

    Args:
        key: a word for the figure's ids, unlike any other's on the page.
        layer: the layer's name.
        loads: what each expert got; at least one line.
        half_range: where the colours end, from the even share to both sides, as a multiple of it.
        experts_on_page: E summed over all layers that are drawn, which sets how fine the map can be.

    Returns:
        The figure.
    """
    experts = loads.shares.shape[1]
    columns = min(240, max(40, _PIXELS // experts_on_page))
    picture, (first, last) = resample(loads, columns)
    with drawing_style():
        height = min(3.6, max(2.2, 1.3 + 0.11 * experts))  # inches
        figure = Figure(figsize=(5.6, height))
        bottom, share = 0.46 / height, 1 - 0.56 / height  # room for the ticks and the label of the steps
        axes = figure.add_axes((0.11, bottom, 0.69, share))
        axes.grid(False)
        axes.spines[:].set_visible(True)
        image = axes.imshow(
            picture.T * experts,
            cmap=_colours(),
            norm=Normalize(1 - half_range, 1 + half_range),
            aspect="auto",
            interpolation="none",
            extent=(first, last, experts - 0.5, -0.5),
        )
        axes.set_xlabel("step")
        axes.set_ylabel("expert")
        axes.yaxis.set_label_coords(-0.11, 0.5)
        axes.xaxis.set_major_locator(
            MaxNLocator(7, integer=True) if len(picture) > 1 else FixedLocator(loads.steps.tolist())
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        bar_axes = figure.add_axes((0.82, bottom, 0.03, share))
        bar = figure.colorbar(image, cax=bar_axes, extend="max" if half_range == 1 else "both")
        bar.ax.grid(False)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)  # as shapes, its cells would show seams
        bar.set_ticks([1 - half_range, 1 - half_range / 2, 1, 1 + half_range / 2, 1 + half_range])
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: _share_name(tick)))
        bar.set_label("share of the load")
        note = f"{experts} expert{'s' if experts > 1 else ''}; 1/E = {1 / experts:.3g} is an even share."
        return Drawing(key, layer, note, to_svg(figure, key, f"Load of each expert over time, layer {layer}: {note}"))


def color_half_range(loads: list[Loads]) -> float:
    """Choose where the colours end, for all the layers of a page, so that they can be compared.

    Args:
        loads: each layer's.

    Returns:
        The distance from the even share that all but 1 % of the loads keep, as a multiple of it, rounded up to 0.2,
        0.5 or 1. More than 1 would only stretch the side above, as a load below 0 does not exist.
    """
    distances = np.concatenate([np.abs(load.shares * load.shares.shape[1] - 1).ravel() for load in loads])
    usual = float(np.nanquantile(distances, 0.99)) if np.isfinite(distances).any() else 1.0
    return next((limit for limit in (0.2, 0.5) if usual <= limit), 1.0)


def resample(loads: Loads, columns: int) -> tuple[Float[np.ndarray, "C E"], tuple[float, float]]:
    """Bring loads to evenly spaced steps.

    Args:
        loads: at least one line, at any steps.
        columns: the most columns the result has.

    Returns:
        The mean load within each column, and the step at the first column's left and the last one's right edge. A
        column without a line repeats the one before it.
    """
    steps = loads.steps
    columns = min(columns, len(steps))
    margin = (steps[-1] - steps[0]) / (2 * (columns - 1)) if columns > 1 else 0.5
    edges = np.linspace(steps[0] - margin, steps[-1] + margin, columns + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, columns - 1)
    picture = np.empty((columns, loads.shares.shape[1]))
    for index in range(columns):
        inside = loads.shares[column == index]
        picture[index] = inside.mean(axis=0) if len(inside) else picture[index - 1]
    return picture, (float(edges[0]), float(edges[-1]))


def _share_name(multiple: float) -> str:
    if multiple == 0:
        return "0"
    return "1/E" if multiple == 1 else f"{multiple:g}/E"
