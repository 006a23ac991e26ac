"""The reports of `moeprune eval --sweep` and `moeprune demo`."""

from __future__ import annotations

from collections.abc import Sequence

from moeprune.demo.results import DemoModel, Summary
from moeprune.pruning.results import Sweep, SweepRow
from moeprune.report.document import Cell, Document, Lines, Table
from moeprune.report.words import checkpoint_on_data, percent


def sweep(result: Sweep) -> Document:
    """Return a row for each way to prune."""
    columns = (
        "kept", "scope", "signal", "compensation", "accuracy", "of full", "same as full", "size", "FLOPs",
    )  # fmt: skip
    rows: list[Sequence[Cell] | None] = []
    previous = result.rows[0].keep
    for row in result.rows:
        if row.keep != previous:
            rows.append(None)
            previous = row.keep
        rows.append(_row(row))
    draws = max(row.draws for row in result.rows)
    notes = [f"random: mean ± standard deviation of {draws} draws. Size and FLOPs: of the whole model."]
    if result.plot is not None:
        notes.append(f"drawn in {result.plot}")
    return Document(checkpoint_on_data(result.checkpoint, result.data), [Table(columns, rows), Lines(notes)])


def _row(row: SweepRow) -> tuple[str, ...]:
    deviation = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.1f}"
    return (
        row.keep,
        row.scope or "full model",
        row.signal or "",
        row.compensate or "",
        percent(row.accuracy, 2) + deviation,
        percent(row.retained) if row.retained is not None else "",
        percent(row.agreement),
        *_remaining(row),
    )


def demo(result: Summary) -> Document:
    """Return a table for each model: methods in rows, kept shares in columns."""
    title = f"wrote checkpoints, analyses and evaluations into {result.directory}"
    return Document(title, [_demo_table(model) for model in result.models.values()])


def _demo_table(model: DemoModel) -> Table:
    full, *others = model.rows
    pruned = [row for row in others if row.keep != "0"]
    keeps = list(dict.fromkeys(row.keep for row in pruned))
    last = keeps[-1]
    data = model.data
    title = f"{model.title}: full model {percent(full.accuracy, 2)} on {data.spec} ({data.samples} samples)"
    columns = [*(f"{keep}\nkept" for keep in keeps), f"size\nat {last}", f"FLOPs\nat {last}"]
    rows: list[Sequence[Cell] | None] = []
    for label in dict.fromkeys(row.label for row in pruned):
        by_keep = {row.keep: row for row in pruned if row.label == label}
        rows.append([label or "", *(_retained(by_keep[keep]) for keep in keeps), *_remaining(by_keep[last])])
    rows.append(None)
    for row in others:
        if row.keep == "0":
            label = f"no experts at all: {row.compensate}"
            rows.append([label, _retained(row), *[""] * (len(keeps) - 1), *_remaining(row)])
    return Table(("accuracy as a share\nof the full model's", *columns), rows, title)


def _remaining(row: SweepRow) -> tuple[str, str]:
    return percent(row.size), percent(row.flops)


def _retained(row: SweepRow) -> str:
    if row.retained is None:
        return ""
    deviation = ""
    if row.accuracy_sd is not None and row.accuracy:
        deviation = f" ± {100 * row.accuracy_sd * row.retained / row.accuracy:.0f}"
    return percent(row.retained) + deviation
