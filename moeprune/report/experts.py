"""The experts of a layer on a page: masses over all inputs and over those of each class."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from numpy.typing import NDArray

from moeprune.calibration.statistics import LayerStatistics
from moeprune.plan import LayerPlan
from moeprune.report.document import Block, Figure, Heading, Lines, Table
from moeprune.report.figures import FAINT, INK, PALETTE, RULE, panel, percent_axis
from moeprune.report.words import percent, plan_in_words

SMALL = 0.25  # share of 1/n below which an expert's mass is not attributed to a class
MOST_CELLS = 256  # rows and columns of a heat map; of more, neighbours are averaged


class Masses:
    """The masses of one layer's n experts, as arrays in float64.

    mean, most: over all inputs (n). best: of an input's best k experts, k = 1…n. order: experts, the largest mean mass
    first. classes: those with inputs (c). by_class: means over their inputs (c,n). columns: experts by the class of
    their largest mass, those of little mass last. kept: by expert (n); None without a set.
    """

    def __init__(self, statistics: LayerStatistics, plan: LayerPlan | None):
        self.mean, self.most, self.best, by_class = (
            getattr(statistics, f"{name}_mass").double().numpy() for name in ("mean", "max", "kept", "class")
        )
        self.n = len(self.mean)
        self.order = np.argsort(-self.mean, kind="stable")
        self.classes = np.flatnonzero(by_class.any(1))
        self.by_class = by_class[self.classes]
        if len(self.classes):
            largest = np.where(self.mean < SMALL / self.n, len(self.classes), self.by_class.argmax(0))
            self.columns = self.order[np.argsort(largest[self.order], kind="stable")]
        kept = None if plan is None else plan.kept
        self.kept = None if kept is None else np.isin(np.arange(self.n), kept)


def experts_of(name: str, statistics: LayerStatistics, plan: LayerPlan | None) -> Iterator[Block]:
    """Yield figures and a table of the experts of a layer, by statistics of the unpruned layer."""
    masses = Masses(statistics, plan)
    yield Heading(f"Experts of `{name}`")
    if plan is not None:
        held = ""
        if masses.kept is not None:
            held = f": the kept experts hold {percent(masses.mean[masses.kept].sum())} of the mass of all inputs"
        elif plan.scope == "input" and plan.signal == "combine" and plan.mass is None and plan.k:
            held = f": the best {plan.k} of an input hold {percent(masses.best[plan.k - 1])} of its mass"
        yield Lines([plan_in_words(plan) + held])
    bars_panel = panel(partial(bars, masses=masses), "mean mass of each expert")
    curves_panel = panel(partial(curves, masses=masses, plan=plan), "mass of k experts")
    n, eighth = masses.n, max(1, masses.n // 8)
    most, least = (f"{percent(masses.mean[j], 2)} (expert {j})" for j in masses.order[[0, -1]])
    description = (
        f"Mean masses of {n} experts, from {most} to {least}; uniform would be {percent(1 / n, 2)}. The best {eighth}"
        f" of an input hold {percent(masses.best[eighth - 1])} of its mass."
    )
    caption = "Mass: an expert's share of the combine weights; the masses of one input sum to 1."
    yield Figure([bars_panel, curves_panel], description, caption)
    if classes := len(masses.classes):
        row, expert = np.unravel_index(masses.by_class.argmax(), masses.by_class.shape)
        description = (
            f"Heat map of {classes} classes and {n} experts. The largest mass is expert {expert}'s in class"
            f" {masses.classes[row]}, {percent(masses.by_class[row, expert])}."
        )
        caption = "Experts by the class of their largest mass; those of little mass at the end."
        caption += "" if masses.kept is None else " Marked above: the kept experts."
        title, height = "mass of each expert over the inputs of each class", 1.2 + min(3.0, 0.16 * classes)
        yield Figure([panel(partial(heat_map, masses=masses), title, height)], description, caption)
    yield _table(masses)


def bars(axes: Axes, masses: Masses) -> None:
    """Draw the mean mass of each expert, the largest first."""
    heights = masses.mean[masses.order]
    if masses.kept is None:
        axes.stairs(heights, fill=True, color=INK)
    else:
        kept = masses.kept[masses.order]
        axes.stairs(heights * kept, fill=True, color=INK, label="kept")
        axes.stairs(heights * ~kept, fill=True, color=RULE, label="dropped")
    axes.axhline(1 / masses.n, color=FAINT, linestyle="--", linewidth=1, label="uniform")
    axes.legend()
    axes.set(xlim=(0, masses.n), xlabel="experts, the largest first", ylabel="mass")
    percent_axis(axes.yaxis)


def curves(axes: Axes, masses: Masses, plan: LayerPlan | None) -> None:
    """Draw the mass of the best k experts over k."""
    ks = np.arange(masses.n + 1)
    overall = masses.mean[masses.order].cumsum()
    axes.plot(ks, np.insert(masses.best, 0, 0), color=INK, label="best k of each input")
    axes.plot(ks, np.insert(overall, 0, 0), color=INK, linestyle="--", label="one set of k for all inputs")
    axes.plot([0, masses.n], [0, 1], color=FAINT, linestyle=":", linewidth=1, label="uniform router")
    if plan is not None and plan.mass is None:
        axes.axvline(plan.k, color=FAINT, linewidth=1, label=f"k = {plan.k}")
    axes.legend(loc="lower right")
    axes.set(xlim=(0, masses.n), ylim=(0, 1.02), xlabel="k", ylabel="mass")
    percent_axis(axes.yaxis)


def heat_map(axes: Axes, masses: Masses) -> None:
    """Draw the mass of each expert over the inputs of each class."""
    rows, n = masses.by_class.shape
    cells = averaged(averaged(masses.by_class[:, masses.columns]).T).T
    colors = LinearSegmentedColormap.from_list("heat", [PALETTE["heat"] + "00", PALETTE["heat"]], N=64)
    scale, extent = PowerNorm(0.5, 0, cells.max()), (0, n, rows, 0)
    image = axes.imshow(cells, colors, scale, aspect="auto", interpolation="none", extent=extent)
    if masses.kept is not None:
        marks = np.flatnonzero(masses.kept[masses.columns]) + 0.5
        above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(marks, np.full(len(marks), 1.03), "v", color=INK, markersize=2.5, **above)
    shown = np.arange(0, rows, -(-rows // 20))
    axes.set_yticks(shown + 0.5, [str(index) for index in masses.classes[shown]])
    axes.set(xlabel="experts", ylabel="class", ylim=(rows, 0))
    axes.grid(visible=False)
    bar: Any = axes.figure.colorbar(image, ax=axes)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)
    percent_axis(bar.ax.yaxis)


def averaged(values: NDArray) -> NDArray:
    """Average neighbouring rows, so that MOST_CELLS are left at most."""
    count = min(len(values), MOST_CELLS)
    edges = np.arange(count + 1) * len(values) // count
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges)[:, None]


def _table(masses: Masses) -> Table:
    rows = []
    for j in masses.order:
        mean, most = percent(masses.mean[j], 2), percent(masses.most[j])
        row = {"expert": str(j), "mean mass": mean, "largest mass\nof an input": most}
        if len(masses.classes):
            largest = masses.by_class[:, j].argmax()
            row["class of the\nlargest mass"] = str(masses.classes[largest])
            row["mass over its\ninputs"] = percent(masses.by_class[largest, j], 2)
        if masses.kept is not None:
            row[""] = "kept" if masses.kept[j] else ""
        rows.append(row)
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows], "experts in numbers", shown=0)
