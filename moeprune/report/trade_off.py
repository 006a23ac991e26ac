"""What a page shows of many ways to prune: the best of them, and accuracy over what each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moeprune.pruning.results import SweepRow
from moeprune.report.commands import percent
from moeprune.report.figure import Axis, Figure, Plot, Series

NEAR = 0.01
"""Accuracy below the full model's that still counts as near it."""
CLOSE_UP = 0.05
"""Accuracy below the full model's that a figure of its own shows."""
Row = SweepRow
Cost = Callable[[Row], float]


def best_of(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """The full model's accuracy, and the cheapest that come near it."""
    full = next(row for row in rows if row.scope is None)
    yield "accuracy of the full model", percent(full.accuracy, 2), f"{len(rows) - 1} ways to prune it"
    near = [row for row in rows if row is not full and row.accuracy >= full.accuracy - NEAR]
    for name, cost in (("size", _size), ("FLOPs", _flops)):
        label = f"least {name} within {100 * NEAR:g} pt"
        if near:
            row = min(near, key=lambda row: (cost(row), -row.accuracy))
            yield label, percent(cost(row)), f"{_way(row)}: accuracy {percent(row.accuracy, 2)}"
        else:
            yield label, "–", "none of them"


def _size(row: Row) -> float:
    return 1 - row.difference.size_reduction


def _flops(row: Row) -> float:
    return 1 - row.difference.flops_reduction


def _speedup(row: Row) -> float:
    return row.latency.batches[0].speedup or 1.0 if row.latency is not None else 1.0


def _way(row: Row) -> str:
    kept = "no expert" if row.keep == "0" else row.keep
    return f"{kept}, {row.scope} by {row.signal}, {row.compensate}"


def trade_off(rows: Sequence[Row]) -> Iterator[Figure]:
    """All points, and again those that are close to the full model."""
    full = next(row for row in rows if row.scope is None)
    names = list(dict.fromkeys(_kind(row) for row in rows if row is not full))
    on_frontier = sum(row.on_frontier is not None and row.on_frontier.size for row in rows)
    description = (
        f"Accuracy of {len(rows) - 1} ways to prune over what remains of size and FLOPs; the table below"
        f" has all of them. {on_frontier} are on the frontier of size."
    )
    yield _panels(rows, full, names, description, "Dashed: no other is as accurate at less cost.")
    low = full.accuracy - CLOSE_UP
    close = [row for row in rows if row.accuracy >= low]
    if 2 < len(close) < len(rows):
        yield _panels(
            close, full, names, f"The same, from {percent(low)} of accuracy on.", "The same, close up."
        )


def _kind(row: Row) -> str:
    """Under which name a row is drawn."""
    if row.label is not None:
        return row.label
    return "random experts" if row.signal == "random" else row.compensate or ""


def _panels(
    rows: Sequence[Row],
    full: Row,
    names: Sequence[str],
    description: str,
    caption: str,
) -> Figure:
    costs = [
        ("size", _size, Axis("of the full model's size", "%")),
        ("FLOPs", _flops, Axis("of the full model's FLOPs", "%")),
    ]
    if full.latency is not None:
        batch = full.latency.batches[0].batch_size
        costs.append(("speed-up", _speedup, Axis(f"speed-up at batch {batch}", "×")))
    shape_of_points = "dots" if any(row.label is not None for row in rows) else "points"
    panels = []
    for title, cost, axis in costs:
        series = []
        if title != "speed-up":
            best = sorted((row for row in rows if getattr(row.on_frontier, title.lower())), key=cost)
            series.append(Series("frontier", [(cost(row), row.accuracy) for row in best], "dashes"))
        for color, name in enumerate(names):
            for shape, is_none in ((shape_of_points, False), ("crosses", True)):
                own = [
                    row
                    for row in rows
                    if row is not full and _kind(row) == name and (row.keep == "0") == is_none
                ]
                if own:
                    label = f"{name}, no expert" if is_none else name
                    series.append(_points(label, own, cost, shape, color))
        series.append(_points("full model", [full], cost, "star", None))
        panels.append(Plot(title, axis, Axis("accuracy", "%"), series))
    return Figure(panels, description, caption)


def _points(name: str, rows: Sequence[Row], cost: Cost, shape: str, color: int | None) -> Series:
    notes = [
        f"{'full model' if row.scope is None else _way(row)}: accuracy {percent(row.accuracy, 2)},"
        f" size {percent(_size(row))}, FLOPs {percent(_flops(row))}"
        for row in rows
    ]
    return Series(name, [(cost(row), row.accuracy) for row in rows], shape, color, notes)
