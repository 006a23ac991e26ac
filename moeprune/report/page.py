"""What `--report` shows: the report of a command, and all that has no place in a terminal.

Figures, every class, every expert, and what the figures rest on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import asdict

from moeprune.calibration.analysis import Analysis
from moeprune.calibration.results import AnalysisReport
from moeprune.evaluation.results import Environment, Evaluation, Forgetting
from moeprune.plan import Plan
from moeprune.pruning.results import Sweep
from moeprune.report import commands as report
from moeprune.report.commands import amount, percent, plain, plan_in_words, points
from moeprune.report.document import (
    Block,
    Cell,
    Document,
    Facts,
    Heading,
    Highlights,
    Interval,
    Lines,
    Table,
    Verdict,
)
from moeprune.report.figure import Figure, Stacks
from moeprune.report.masses import experts_of
from moeprune.report.trade_off import best_of, trade_off

PARTS = ("experts", "routing", "compensation", "other")
CLASSES_SHOWN = 20
MOST_CLASSES = 1000
"""Classes that a table lists."""


@dataclass(frozen=True)
class Background:
    """What a report rests on, beside the JSON values of the command.

    plan: of the model that is evaluated, by layer; empty of a full one. provenance: of its checkpoint.
    analysis: of the full model; None: nothing is said of masses. environment: it was measured in.
    """

    plan: Plan = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    analysis: Analysis | None = None
    environment: Environment | None = None


def evaluation(found: Evaluation, background: Background) -> Document:
    """The page of `moeprune eval`.

    Args:
        found: JSON values, like those of the command's other reports.
        background: what it rests on.
    """
    told = report.evaluation(found)
    blocks: list[Block] = [Highlights(list(_highlights(found)))]
    if found.forgetting is not None and found.forgetting.collapsed:
        collapsed = ", ".join(map(str, found.forgetting.collapsed))
        blocks.append(Lines([f"Classes that collapsed while the average hides it: {collapsed}."]))
    blocks += [Heading("Accuracy, size and FLOPs"), _parts(found), *told.blocks]
    if found.forgetting is not None:
        blocks += _classes(found.forgetting)
    blocks += [*_experts(background), *_rests_on(found, background)]
    return Document(told.title, blocks, told.gates, told.passed)


def sweep(found: Sweep, background: Background) -> Document:
    """The page of `moeprune eval --sweep` and `--frontier`; see evaluation."""
    told = report.sweep(found)
    blocks = [
        Highlights(list(best_of(found.rows))),
        Heading("Accuracy over size and FLOPs"),
        *trade_off(found.rows),
        *told.blocks,
        *_experts(background),
        *_rests_on(found, background),
    ]
    return Document(told.title, blocks)


def analysis(found: AnalysisReport, background: Background) -> Document:
    """The page of `moeprune analyze`; see evaluation."""
    told = report.analysis(found)
    return Document(told.title, [*told.blocks, *_experts(background), *_rests_on(found, background)])


def _highlights(found: Evaluation) -> Iterator[tuple[str, str, str]]:
    model, full, difference = found.model, found.baseline_model, found.difference
    if difference is None or full is None:
        yield "accuracy", percent(model.accuracy, 2), _between(model.accuracy_ci95)
        yield "size", amount(model.bytes, "B"), ""
        yield "FLOPs per input", amount(model.flops_per_input.total), ""
        return
    low, high = difference.accuracy_drop_ci95
    yield "accuracy drop", points(difference.accuracy_drop), f"95 %: {points(low)} to {points(high)}"
    accuracies = f"{_between(model.accuracy_ci95)}; full model {percent(full.accuracy, 2)}"
    yield "accuracy", percent(model.accuracy, 2), accuracies
    sizes = " → ".join(amount(side.bytes, "B") for side in (full, model))
    yield "size", percent(1 - difference.size_reduction), f"of the full model's: {sizes}"
    flops = " → ".join(amount(side.flops_per_input.total) for side in (full, model))
    yield "FLOPs per input", percent(1 - difference.flops_reduction), f"of the full model's: {flops}"
    flips = difference.outcomes
    flipped = f"as the full model; flips: {flips.lost} to wrong, {flips.won} to right"
    yield "same prediction", percent(difference.agreement, 2), flipped
    if found.latency is not None:
        slowest = min(found.latency.batches, key=lambda batch: batch.speedup or math.inf)
        yield "speed-up, at least", f"{slowest.speedup:.2f}×", f"at batch {slowest.batch_size}"


def _between(interval: Sequence[float]) -> str:
    return f"95 %: {percent(interval[0])} to {percent(interval[1])}"


def _parts(found: Evaluation) -> Figure:
    """Size and FLOPs of the models by part."""
    models = {"model": found.model, "full model": found.baseline_model}
    panels, said = [], []
    for title, figure, unit in (("size", "bytes_by_part", "B"), ("FLOPs per input", "flops_per_input", "")):
        rows = []
        for name, model in models.items():
            if model is not None:
                parts = [getattr(getattr(model, figure), part) for part in PARTS]
                rows.append((name, amount(sum(parts), unit), parts))
                each = ", ".join(
                    f"{part} {amount(size, unit)}" for part, size in zip(PARTS, parts, strict=True)
                )
                said.append(f"{title} of the {name}: {amount(sum(parts), unit)} ({each})")
        panels.append(Stacks(title, rows, PARTS))
    return Figure(panels, "; ".join(said))


def _classes(found: Forgetting) -> Iterator[Block]:
    """The change of each class, those that collapsed first."""
    yield Heading("Classes")
    entries = sorted(found.classes, key=lambda entry: entry.index not in found.collapsed)
    less = sum(entry.accuracy_drop_ci95[0] > 0 for entry in entries)
    more = sum(entry.accuracy_drop_ci95[1] < 0 for entry in entries)
    text = (
        f"Of {len(entries)} classes {less} lost and {more} gained more than chance explains at 95 %, each"
        " taken by itself."
    )
    beyond = len(entries) - MOST_CLASSES
    yield Lines([text, *([f"The {beyond} classes that changed least are left out."] if beyond > 0 else [])])
    reach = max(abs(bound) for entry in entries for bound in entry.accuracy_drop_ci95)
    rows: list[Sequence[Cell]] = []
    for entry in entries[:MOST_CLASSES]:
        low, high = (-bound + 0.0 for bound in reversed(entry.accuracy_drop_ci95))
        change = f"{points(-entry.accuracy_drop)} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(
            (
                str(entry.index),
                Interval(change, low, -entry.accuracy_drop, high, reach),
                percent(entry.baseline_accuracy),
                percent(entry.accuracy),
                str(entry.samples),
                Verdict(False, "collapsed") if entry.index in found.collapsed else "",
            )
        )
    columns = ("class", "change (95 %)", "full model", "model", "samples", "")
    yield Table(columns, rows, shown=max(CLASSES_SHOWN, len(found.collapsed)))


def _experts(background: Background) -> Iterator[Block]:
    if background.analysis is not None:
        for name, statistics in background.analysis.layers.items():
            yield from experts_of(name, statistics, background.plan.get(name))


def _rests_on(found: Evaluation | Sweep | AnalysisReport, background: Background) -> Iterator[Block]:
    """Checkpoints, data, plans and environment."""
    yield Heading("What this rests on")
    data, analysed = found.data, background.analysis
    facts = [("checkpoint", plain(found.checkpoint))]
    if isinstance(found, Evaluation) and found.baseline is not None:
        facts.append(("full model", plain(found.baseline)))
    facts.append(("data", f"{plain(data.spec)}, {data.samples} samples"))
    facts.append(("data, SHA-256", plain(data.fingerprint)))
    if analysed is not None:
        made_from = analysed.provenance["data"]
        facts.append(("analysis", f"of {plain(made_from['spec'])}, {made_from['samples']} samples"))
        facts.append(("analysis, SHA-256 of its data", plain(made_from["fingerprint"])))
        facts.append(("analysis, fingerprint of its model", analysed.provenance["checkpoint"]["fingerprint"]))
    for name, plan in background.plan.items():
        kept = f": {plain(plan.kept)}" if plan.kept is not None else ""
        facts.append((f"plan of {name}", plan_in_words(plan) + kept))
    facts += [(f"provenance: {name}", plain(value)) for name, value in background.provenance.items()]
    if background.environment is not None:
        facts += [
            (name.replace("_", " "), plain(value)) for name, value in asdict(background.environment).items()
        ]
    yield Facts(facts)
