"""The report of `moeprune eval --sweep`."""

from __future__ import annotations

from collections.abc import Sequence

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
        percent(row.size),
        percent(row.flops),
    )
