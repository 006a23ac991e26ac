"""Plots of measured points, with matplotlib (the extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.files.writing import write_bytes
from moeprune.pruning.results import SweepRow
from moeprune.pruning.sweep import METHODS, cost

SUFFIXES = (".png", ".svg")
COLORS = ("#0072b2", "#56b4e9", "#009e73", "#7fc97f", "#d55e00", "#e69f00", "#cc79a7", "#999999")
"""Of the methods, in their order: they differ for colour-blind readers too."""
Point = Callable[[SweepRow], float]


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before any work is done for it.

    Raises:
        MoepruneError: another suffix than SUFFIXES, or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise MoepruneError(
            f"`{path}` is no kind of plot", f"give a path that ends with {' or '.join(SUFFIXES)}"
        )
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MoepruneError("plots need matplotlib", "install it, or moeprune's extra `report`") from None


def plot_frontier(rows: Sequence[SweepRow], title: str, path: Path, overwrite: bool = True) -> None:
    """Draw accuracy over size, over FLOPs and, where it was measured, over speed-up; equal rows give equal
    bytes.

    Args:
        rows: of a sweep, each with a `label`; the one without is the full model's.
        title: above the plot.
        path: to write; by its suffix a PNG or an SVG.
        overwrite: replace a file that exists.

    Raises:
        MoepruneError: the path cannot be written, or exists and may not be replaced.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels: list[tuple[str, Point]] = [
        ("size, share of the full model's", lambda row: cost(row, "size")),
        ("FLOPs, share of the full model's", lambda row: cost(row, "flops")),
    ]
    if rows[0].latency is not None:
        batch = rows[0].latency.batches[0].batch_size
        panels.append((f"speed-up with {batch} input{'s' if batch > 1 else ''}", _speedup))
    figure = Figure(figsize=(5 * len(panels), 5.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    full = next(row for row in rows if row.label is None)
    for axis, (name, point) in zip(axes, panels, strict=True):
        axis.axhline(full.accuracy, color="black", linewidth=1, linestyle=":")
        for color, label in zip(COLORS, METHODS.values(), strict=True):
            own = [row for row in rows if row.label == label and row.keep != "0"]
            none = [row for row in rows if row.label == label and row.keep == "0"]
            if own:
                xs, ys = [point(row) for row in own], [row.accuracy for row in own]
                axis.plot(xs, ys, color=color, marker="o", markersize=4, linewidth=1.5, label=label)
            xs, ys = [point(row) for row in none], [row.accuracy for row in none]
            axis.plot(xs, ys, color=color, marker="x", linestyle="")
        axis.plot([point(full)], [full.accuracy], color="black", marker="*", markersize=11, linestyle="")
        axis.set_xlabel(name)
        axis.grid(color="#dddddd", linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("accuracy")
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.text(0.995, 0.002, "★ full model   × no expert at all", ha="right", va="bottom", fontsize=8)
    buffer = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "moeprune"}):
        figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    write_bytes(path, buffer.getvalue(), overwrite)


def _speedup(row: SweepRow) -> float:
    return row.latency.batches[0].speedup or 1.0 if row.latency is not None else 1.0
