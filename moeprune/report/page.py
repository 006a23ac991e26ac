"""The page of `--report`: a command's report, figures, every class and expert, and their origins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from msgspec.structs import asdict

from moeprune.calibration.analysis import Analysis
from moeprune.calibration.results import AnalysisReport
from moeprune.evaluation.results import Environment, Evaluation, Forgetting
from moeprune.plan import Plan
from moeprune.pruning.results import Sweep
from moeprune.report.commands import document_of
from moeprune.report.document import (
    Block,
    Cell,
    Document,
    Facts,
    Figure,
    Heading,
    Highlights,
    Interval,
    Lines,
    Table,
    Verdict,
)
from moeprune.report.experts import experts_of
from moeprune.report.figures import panel, stacks
from moeprune.report.trade_off import best_of, trade_off
from moeprune.report.words import amount, ci95, percent, plain, plan_in_words, points

CLASSES_SHOWN = 20
MOST_CLASSES = 1000
"""Classes that a table lists."""


@dataclass(frozen=True)
class Background:
    """Context of a result that a page shows."""

    plan: Plan = field(default_factory=dict)  # of the evaluated model
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of its checkpoint
    analysis: Analysis | None = None  # of the full model; None: nothing about masses
    environment: Environment | None = None


def page_of(result: Evaluation | Sweep | AnalysisReport, background: Background) -> Document:
    """Return the page of `eval`, `eval --sweep` or `analyze`."""
    document = document_of(result)
    blocks: list[Block] = []
    if isinstance(result, Evaluation):
        blocks.append(Highlights(list(_highlights(result))))
        if result.forgetting is not None and result.forgetting.collapsed:
            collapsed = ", ".join(map(str, result.forgetting.collapsed))
            blocks.append(Lines([f"Classes that collapsed, hidden by the average: {collapsed}."]))
        blocks += [Heading("Accuracy, size and FLOPs"), _parts(result)]
    elif isinstance(result, Sweep):
        blocks.append(Highlights(list(best_of(result.rows))))
        blocks += [Heading("Accuracy over size and FLOPs"), *trade_off(result.rows)]
    blocks += document.blocks
    if isinstance(result, Evaluation) and result.forgetting is not None:
        blocks += _classes(result.forgetting)
    if background.analysis is not None:
        for name, statistics in background.analysis.layers.items():
            blocks += experts_of(name, statistics, background.plan.get(name))
    return Document(document.title, [*blocks, *_origins(result, background)], document.gates)


def _highlights(result: Evaluation) -> Iterator[tuple[str, str, str]]:
    model, full, difference = result.model, result.baseline_model, result.difference
    accuracy = "95 %: {} to {}".format(*map(percent, model.accuracy_ci95))
    if difference is None or full is None:
        yield "accuracy", percent(model.accuracy, 2), accuracy
        yield "size", amount(model.bytes, "B"), ""
        yield "FLOPs per input", amount(model.flops_per_input.total), ""
        return
    yield "accuracy drop", points(difference.accuracy_drop), ci95(difference.accuracy_drop_ci95)
    yield "accuracy", percent(model.accuracy, 2), f"{accuracy}; full model {percent(full.accuracy, 2)}"
    sizes = f"{amount(full.bytes, 'B')} → {amount(model.bytes, 'B')}"
    yield "size", percent(1 - difference.size_reduction), f"of the full model's: {sizes}"
    flops = f"{amount(full.flops_per_input.total)} → {amount(model.flops_per_input.total)}"
    yield "FLOPs per input", percent(1 - difference.flops_reduction), f"of the full model's: {flops}"
    flips = f"flips: {difference.outcomes.lost} to wrong, {difference.outcomes.won} to right"
    yield "same prediction", percent(difference.agreement, 2), f"as the full model; {flips}"
    if result.latency is not None:
        slowest, batch = min((row.speedup or 1.0, row.batch_size) for row in result.latency.batches)
        yield "speed-up, at least", f"{slowest:.2f}×", f"at batch {batch}"


def _parts(result: Evaluation) -> Figure:
    """Draw size and FLOPs of the models by part."""
    full = {} if result.baseline_model is None else {"full model": result.baseline_model}
    models = {"model": result.model, **full}
    panels, said = [], []
    for title, figure, unit in (("size", "bytes_by_part", "B"), ("FLOPs per input", "flops_per_input", "")):
        rows = {}
        for name, model in models.items():
            parts = {part: n for part, n in asdict(getattr(model, figure)).items() if part != "total"}
            total = amount(sum(parts.values()), unit)
            rows[f"{name}\n{total}"] = parts
            each = ", ".join(f"{part} {amount(value, unit)}" for part, value in parts.items())
            said.append(f"{title} of the {name}: {total} ({each})")
        panels.append(panel(partial(stacks, rows=rows), title, height=0.7 + 0.4 * len(rows)))
    return Figure(panels, "; ".join(said))


def _classes(forgetting: Forgetting) -> Iterator[Block]:
    """Return the change of each class, those that collapsed first."""
    yield Heading("Classes")
    changes = sorted(forgetting.classes, key=lambda change: change.index not in forgetting.collapsed)
    less = sum(change.accuracy_drop_ci95[0] > 0 for change in changes)
    more = sum(change.accuracy_drop_ci95[1] < 0 for change in changes)
    line = f"Of {len(changes)} classes, {less} lost and {more} gained more than chance explains (95 % each)."
    left_out = f"The {len(changes) - MOST_CLASSES} classes that changed least are left out."
    yield Lines([line, left_out] if len(changes) > MOST_CLASSES else [line])
    reach = max(abs(bound) for change in changes for bound in change.accuracy_drop_ci95)
    rows: list[Sequence[Cell]] = []
    for change in changes[:MOST_CLASSES]:
        low, high = (-bound + 0.0 for bound in reversed(change.accuracy_drop_ci95))
        text = f"{points(-change.accuracy_drop)} ({100 * low:+.1f} to {100 * high:+.1f})"
        interval = Interval(text, low, -change.accuracy_drop, high, reach)
        accuracies = percent(change.baseline_accuracy), percent(change.accuracy)
        verdict = Verdict(False, "collapsed") if change.index in forgetting.collapsed else ""
        rows.append((str(change.index), interval, *accuracies, str(change.samples), verdict))
    columns = ("class", "change (95 %)", "full model", "model", "samples", "")
    yield Table(columns, rows, shown=max(CLASSES_SHOWN, len(forgetting.collapsed)))


def _origins(result: Evaluation | Sweep | AnalysisReport, background: Background) -> Iterator[Block]:
    """Return checkpoints, data, plans and environment."""
    yield Heading("Where these figures come from")
    facts = [("checkpoint", plain(result.checkpoint))]
    if isinstance(result, Evaluation) and result.baseline is not None:
        facts.append(("full model", plain(result.baseline)))
    facts.append(("data", f"{plain(result.data.spec)}, {result.data.samples} samples"))
    facts.append(("data, SHA-256", plain(result.data.fingerprint)))
    if background.analysis is not None:
        origin = background.analysis.origin
        facts.append(("analysis", f"of {plain(origin.data.spec)}, {origin.data.samples} samples"))
        facts.append(("analysis, SHA-256 of its data", plain(origin.data.fingerprint)))
        facts.append(("analysis, fingerprint of its model", plain(origin.checkpoint)))
    plans = {name: plan_in_words(plan, with_kept=True) for name, plan in background.plan.items()}
    facts += [(f"plan of {name}", text) for name, text in plans.items()]
    facts += [(f"provenance: {name}", plain(value)) for name, value in background.provenance.items()]
    settings = {} if background.environment is None else asdict(background.environment)
    facts += [(name.replace("_", " "), plain(value)) for name, value in settings.items()]
    yield Facts(facts)
