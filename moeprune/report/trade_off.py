"""Accuracy over cost of the rows of a sweep: the figures of a page, and the file of `--plot`."""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from moeprune.files.disk import write_file
from moeprune.plan import COMPENSATIONS
from moeprune.pruning.results import SweepRow
from moeprune.report.document import Figure
from moeprune.report.figures import COLORS, FAINT, INK, panel, percent_axis, style
from moeprune.report.words import percent

COLOR_OF = dict(zip((*COMPENSATIONS, "random experts"), (COLORS[i] for i in (1, 3, 4, 2, 0, 6, 5, 7)), strict=True))
"""By compensation, in every picture; random experts look alike."""
MARKER_OF = {"static": "o", "input": "^", "batch": "s"}
NEAR, CLOSE = 0.01, 0.05  # accuracy below the full model's that counts as near it, and that a figure of its own shows


def best_of(rows: Sequence[SweepRow]) -> Iterator[tuple[str, str, str]]:
    """Return the full model's accuracy, and the cheapest ways to prune that come near it."""
    full, *pruned = rows
    yield "accuracy of the full model", percent(full.accuracy, 2), f"{len(pruned)} ways to prune it"
    near = [row for row in pruned if row.accuracy >= full.accuracy - NEAR]
    for name, cost in (("size", "size"), ("FLOPs", "flops")):
        value, note = "–", "none of them"
        if near:
            best = min(near, key=lambda row: (getattr(row, cost), -row.accuracy))
            kept = "no expert" if best.keep == "0" else best.keep
            value = percent(getattr(best, cost))
            note = f"{kept}, {best.label}: accuracy {percent(best.accuracy, 2)}"
        yield f"least {name} within {100 * NEAR:g} pt", value, note


def trade_off(rows: Sequence[SweepRow]) -> Iterator[Figure]:
    """Yield a figure of all rows, the full model first, and one of those that are close to it."""
    best = sum(row.on_frontier is not None and row.on_frontier.size for row in rows)
    description = f"Accuracy of {len(rows) - 1} ways to prune over the remaining size and FLOPs: the table below has"
    description += f" them all. {best} are on the frontier of size."
    yield _figure(rows, description, "Dashed: no other way is as accurate at less cost.")
    low = rows[0].accuracy - CLOSE
    close = [row for row in rows if row.accuracy >= low]
    if 2 < len(close) < len(rows):
        yield _figure(close, f"The ways with an accuracy of {percent(low)} or more.", "The best, close up.")


def _figure(rows: Sequence[SweepRow], description: str, caption: str) -> Figure:
    entries = _legend(rows)

    def explain(axes: Axes) -> None:
        axes.set_axis_off()
        axes.legend(handles=entries, loc="upper left", borderaxespad=0)

    panels = [panel(partial(draw, rows=rows, cost=cost, label=label)) for cost, label in _axes_of(rows[0])]
    return Figure([*panels, panel(explain, height=0.25 + 0.19 * len(entries))], description, caption)


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
        percent_axis(axes.xaxis)
    plot(rows[:1], "*", INK, 0, 10)
    percent_axis(axes.yaxis)
    axes.set(xlabel=label, ylabel="accuracy")


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
