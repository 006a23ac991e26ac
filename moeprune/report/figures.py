"""Panels of figures as SVG for a page, drawn by matplotlib (the extra `report`)."""

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import PercentFormatter

PALETTE = {
    "ink": "#1b1f24", "faint": "#59636e", "rule": "#d5dae0", "heat": "#d9480f",
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#cc79a7",
    "c4": "#56b4e9", "c5": "#b58900", "c6": "#7a5cc0", "c7": "#8b8f94",
    "c8": "#8c564b", "c9": "#c2255c", "c10": "#2b8a3e", "c11": "#2f3e9e",
}  # fmt: skip
"""Colours by the names of the page's CSS variables, as on a light background."""
INK, FAINT, RULE = PALETTE["ink"], PALETTE["faint"], PALETTE["rule"]
COLORS = [PALETTE[f"c{index}"] for index in range(12)]  # of parts of a model, or of compensations; masses have none
STYLE: dict[str, Any] = {
    "svg.hashsalt": "moeprune", "image.composite_image": False, "font.size": 9, "figure.dpi": 120,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "axes.axisbelow": True,
    "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "text.parse_math": False,
}  # fmt: skip
WIDTH, HEIGHT = 4.2, 2.9  # inches of a panel


def style(fonttype: str) -> AbstractContextManager[None]:
    """Draw in the style of moeprune, whatever the user's own style is."""
    return context({**STYLE, "svg.fonttype": fonttype}, after_reset=True)


def panel(paint: Callable[[Axes], object], title: str = "", height: float = HEIGHT) -> str:
    """Return a panel as an `svg` element with the page's colours; equal panels give equal bytes. height: in inches."""
    with style("none"):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        paint(axes)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    return _within_html(file.getvalue())


def _within_html(svg: str) -> str:
    """Remove what only a file needs, and name colours by the page's variables."""
    root, rest = svg[svg.index("<svg") :].replace("xlink:href", "href").split(">", 1)
    root = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", root)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)  # these recur in every panel
    variables = {color: f"var(--{name})" for name, color in PALETTE.items()}
    colors = re.compile("|".join(variables))
    attributes = re.compile(r'(style|fill|stroke)="[^"]*"')
    rest = attributes.sub(lambda text: colors.sub(lambda color: variables[color[0]], text[0]), rest)
    return f"{root}>{rest}".strip()


def percent_axis(axis: Any) -> None:
    """Show the numbers of an axis as percent."""
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def stacks(axes: Axes, rows: dict[str, dict[str, float]]) -> None:
    """Draw the sizes of parts, for each row by its label."""
    labels = list(rows)
    left = [0.0] * len(rows)
    for color, part in zip(COLORS, rows[labels[0]], strict=False):
        sizes = [parts[part] for parts in rows.values()]
        axes.barh(labels, sizes, left=left, color=color, height=0.6, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    axes.figure.legend(loc="outside lower left", ncols=4, columnspacing=1, handlelength=1)
