"""How figures look, and how they become part of a page in light and in dark mode.

matplotlib draws with stand-in colours that occur nowhere else. In the finished SVG each is exchanged for a CSS
variable, so that the page's style sheet decides, and both modes share one drawing.
"""

import io
import re
from contextlib import AbstractContextManager

from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

INK = "#a1b0c1"
"""Text and axes."""

GRID = "#a1b0c2"
"""Grid lines."""

MUTED = "#a1b0c3"
"""Reference lines and their labels."""

SERIES = tuple(f"#a1b0d{index}" for index in range(8))
"""Curves; the ninth has the first one's colour and another dash."""

DASHES = ("solid", "dashed", "dotted")

_VARIABLES = {INK: "--ink", GRID: "--grid", MUTED: "--muted"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "svg.hashsalt": "moe",  # the same drawing gets the same ids on every run
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def drawing_style() -> AbstractContextManager[None]:
    """The page's settings of matplotlib, free of the user's own, for the figures made within a ``with``."""
    return style.context(["default", _STYLE])


def series_variable(index: int) -> str:
    """The CSS variable with the colour of the curve ``index``.

    Args:
        index: from 0.
    """
    return _VARIABLES[SERIES[index % len(SERIES)]]


def series_dash(index: int) -> str:
    """The dash of the curve ``index``, a name that both matplotlib and CSS know.

    Args:
        index: from 0.
    """
    return DASHES[index // len(SERIES) % len(DASHES)]


def to_svg(figure: Figure, key: str, description: str) -> Markup:
    """Turn a figure into an SVG element for the body of a page.

    Args:
        figure: drawn with the colours of this module.
        key: a word that no other figure of the page has; its ids start with it.
        description: what the figure shows, for readers who do not see it.

    Returns:
        The element, as markup that is safe to put into a page: matplotlib has escaped every text in it.
    """
    buffer = io.StringIO()
    # Without metadata there is no date, so that the same run gives the same page.
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")), dpi=100)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)
    assert view_box is not None
    # matplotlib's own style sheet would apply to the whole page; the page's has the same rule.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    # A hundredth of a point is finer than any screen; matplotlib's six digits would be half of the page.
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), body)
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = body.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    label = Markup.escape(description)
    return Markup(f'<svg {view_box.group()} role="img" aria-label="{label}">{body}')
