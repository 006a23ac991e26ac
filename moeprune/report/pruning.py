"""The reports of `moeprune prune`, `moeprune eval --sweep` and `moeprune demo`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from moeprune.demo.results import DemoModel, Summary
from moeprune.models.results import ModelCost
from moeprune.pruning.results import Pruned, Search, Sweep, SweepRow
from moeprune.report.document import Cell, Document, Facts, Lines, Table
from moeprune.report.words import amount, checkpoint_on_data, ci95, flops_in_words, percent, plan_in_words, points


def pruning(result: Pruned) -> Document:
    """Return size, FLOPs, the confirmed accuracy drop, and the plan of each layer."""
    facts: list[tuple[str, str]] = []
    if result.model is not None:
        is_adaptive = any(plan.mass is not None for plan in result.plan.values())
        facts += _costs(result.full_model, result.model, is_adaptive)
    if result.search is not None:
        facts.append(("accuracy drop", _confirmed(result.search)))
    facts += [(name, plan_in_words(plan, with_kept=True)) for name, plan in result.plan.items()]
    written = [path for path in (result.checkpoint, result.saved_plan) if path is not None]
    return Document(f"wrote {' and '.join(written)}", [Facts(facts)])


def _costs(full: ModelCost, pruned: ModelCost, is_adaptive: bool) -> list[tuple[str, str]]:
    """Return size and FLOPs before and after; is_adaptive: FLOPs depend on the input."""
    sizes = f"{amount(full.bytes, 'B')} → {amount(pruned.bytes, 'B')} ({percent(pruned.bytes / full.bytes)})"
    full_flops, flops = full.flops_per_input.total, pruned.flops_per_input
    change = (
        f"{amount(full_flops)} → {'at most ' if is_adaptive else ''}{flops_in_words(flops)},"
        f" {percent(flops.total / full_flops)}{' (eval measures it)' if is_adaptive else ''}"
    )
    return [("size", sizes), ("FLOPs per input", change)]


def _confirmed(search: Search) -> str:
    found = search.confirmed
    bound = ""
    if found.bound is not None:
        bound = f"; at most {points(found.bound)} with confidence {found.confidence:g}"
    drop = f"{points(found.accuracy_drop)} ({ci95(found.accuracy_drop_ci95)}{bound})"
    return f"{drop} on {found.samples} samples that were not searched ({len(search.tried)} plans tried)"


def sweep(result: Sweep) -> Document:
    """Return a row for each way to prune."""
    how = ("kept", "scope", "signal", "compensation")
    columns = (*how, "accuracy", "of full", "same as full", "size", "FLOPs")
    rows: list[Sequence[Cell] | None] = []
    for _, group in groupby(result.rows, lambda row: row.keep):
        rows += [*map(_row, group), None]
    rows.pop()
    draws = max(row.draws for row in result.rows)
    notes = [f"random: mean ± standard deviation of {draws} draws. Size and FLOPs: of the whole model."]
    if result.plot is not None:
        notes.append(f"drawn in {result.plot}")
    return Document(checkpoint_on_data(result.checkpoint, result.data), [Table(columns, rows), Lines(notes)])


def _row(row: SweepRow) -> tuple[str, ...]:
    deviation = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.1f}"
    way = row.keep, row.scope or "full model", row.signal or "", row.compensate or ""
    retained = "" if row.retained is None else percent(row.retained)
    return *way, percent(row.accuracy, 2) + deviation, retained, percent(row.agreement), *_remaining(row)


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
    if row.accuracy_sd is None or not row.accuracy:
        return percent(row.retained)
    return f"{percent(row.retained)} ± {100 * row.accuracy_sd * row.retained / row.accuracy:.0f}"
