"""Accuracy over cost of the rows of a sweep: the figures of a page, and the file of `--plot`."""

import io
import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from moeprune.files.disk import write_file
from moeprune.plan import COMPENSATIONS
from moeprune.pruning.results import SweepRow
from moeprune.report.document import Figure
from moeprune.report.figures import COLORS, FAINT, INK, panel, percent_axis, style

NAMES = (*COMPENSATIONS, "random experts")
COLOR_OF = dict(zip(NAMES, (COLORS[i] for i in (1, 3, 4, 2, 0, 6, 8, 9, 11, 10, 5, 7)), strict=True))
"""By compensation, in every picture; random experts look alike."""
MARKER_OF = {"static": "o", "input": "^", "batch": "s"}
POINT = 0.01  # one percentage point


def trade_off(rows: Sequence[SweepRow]) -> Figure:
    """Return a figure of all rows, the full model first."""
    best = sum(row.on_frontier is not None and row.on_frontier.size for row in rows)
    description = f"Accuracy of {len(rows) - 1} ways to prune over the remaining size and FLOPs: the table below has"
    description += f" them all. {best} are on the frontier of size."
    entries = _legend(rows)

    def explain(axes: Axes) -> None:
        axes.set_axis_off()
        axes.legend(handles=entries, loc="upper left", borderaxespad=0)

    panels = [panel(partial(draw, rows=rows, cost=cost, label=label)) for cost, label in _axes_of(rows[0])]
    panels.append(panel(explain, height=0.25 + 0.19 * len(entries)))
    return Figure(panels, description, "Dashed: no other way is as accurate at less cost. Both axes stretch the best.")


def _axes_of(full: SweepRow) -> list[tuple[str, str]]:
    """Return the cost on each x axis, and its label."""
    axes = [("size", "size, share of the full model's"), ("flops", "FLOPs, share of the full model's")]
    if full.latency is not None:
        axes.append(("speedup", f"speed-up at batch {full.latency.batches[0].batch_size}"))
    return axes


def draw(axes: Axes, rows: Sequence[SweepRow], cost: str, label: str) -> None:
    """Draw accuracy over a cost: a point for each row, the full model first, and lines between shares."""

    def plot(rows: Sequence[SweepRow], form: str, color: str, width: float, markersize: float = 5) -> None:
        xs, ys = [getattr(row, cost) for row in rows], [row.accuracy for row in rows]
        axes.plot(xs, ys, form, color=color, linewidth=width, markersize=markersize)

    def way(row: SweepRow) -> tuple:
        return row.label, row.keep == "0"

    for (_, is_none), group in groupby(sorted(rows[1:], key=way), way):
        own = list(group)
        plot(own, f"{'x' if is_none else MARKER_OF[own[0].scope or '']}-", _color(own[0]), 0.5)
    if cost == "speedup":
        axes.xaxis.set_major_formatter("{x:g}×")
    else:
        best = [row for row in rows if row.on_frontier and getattr(row.on_frontier, cost)]
        plot(sorted(best, key=lambda row: getattr(row, cost)), "--", FAINT, 1)
        costs = [getattr(row, cost) for row in rows]
        if min(costs) < max(costs) / 2:
            axes.set_xscale("log", subs=[])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        percent_axis(axes.xaxis)
    plot(rows[:1], "*", INK, 0, 10)
    _stretch(axes, max(row.accuracy for row in rows))
    percent_axis(axes.yaxis)
    axes.set(xlabel=label, ylabel="accuracy")


def _stretch(axes: Axes, top: float) -> None:
    """Show accuracies by the logarithm of what they lack to the best, so that a point counts most near it."""

    def place(accuracy: NDArray) -> NDArray:
        return -np.log(np.maximum(top - accuracy, -POINT / 2) + POINT)

    def accuracy_at(place: NDArray) -> NDArray:
        return top + POINT - np.exp(-place)

    lowest = axes.dataLim.y0
    axes.set_yscale("function", functions=(place, accuracy_at))
    axes.set_ylim(lowest - 0.1 * (top - lowest) - POINT / 2, top + POINT / 2)
    drops = [POINT * points for points in (1, 2, 5, 10, 20, 50)]
    ticks = [math.floor((top - drop) / drop) * drop for drop in drops if (top - drop) // drop * drop >= lowest - drop]
    axes.set_yticks([math.floor(top / POINT) * POINT, *ticks])


def _color(row: SweepRow) -> str:
    return COLOR_OF["random experts" if row.signal == "random" else row.compensate or "none"]


def _legend(rows: Sequence[SweepRow]) -> list[Line2D]:
    pruned = rows[1:]
    colors, scopes = {_color(row) for row in pruned}, {row.scope for row in pruned}
    entries = [("full model", INK, "*", "")]
    entries += [(name, color, "o", "") for name, color in COLOR_OF.items() if color in colors]
    if len(scopes) > 1:
        entries += [(f"scope {name}", FAINT, mark, "") for name, mark in MARKER_OF.items() if name in scopes]
    if any(row.keep == "0" for row in pruned):
        entries.append(("no expert at all", FAINT, "x", ""))
    entries.append(("frontier", FAINT, "", "--"))
    return [Line2D([], [], color=color, marker=mark, ls=ls, label=name) for name, color, mark, ls in entries]


def plot_trade_off(rows: Sequence[SweepRow], title: str, path: Path, overwrite: bool = True) -> None:
    """Write a PNG or SVG of accuracy over each cost; equal rows, the full model first, give equal bytes."""
    shown = _axes_of(rows[0])
    with style("path"):
        figure = Drawing(figsize=(5 * len(shown), 5), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (cost, label) in zip(panels, shown, strict=True):
            draw(axes, rows, cost, label)
            axes.label_outer()
        figure.legend(handles=_legend(rows), loc="outside lower center", ncols=5)
        file = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(file, format=path.suffix[1:], metadata=metadata)
    write_file(path, file.getvalue(), overwrite)
