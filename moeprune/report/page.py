"""The page of `--report`: a command's report, figures, every class and expert, and their origins."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

from msgspec.structs import asdict

from moeprune.calibration.analysis import Analysis
from moeprune.calibration.results import AnalysisReport
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.evaluation.results import Environment, Evaluation, Forgetting
from moeprune.models.model import Model
from moeprune.pruning.results import LanguageSweep, Sweep
from moeprune.report import document as doc
from moeprune.report import language
from moeprune.report.commands import document_of
from moeprune.report.experts import experts_of
from moeprune.report.figures import panel, stacks
from moeprune.report.sweeps import highlights
from moeprune.report.trade_off import trade_off
from moeprune.report.words import amount, ci95, percent, plain, plan_in_words, points

Reported: TypeAlias = "Evaluation | LanguageEvaluation | Sweep | LanguageSweep | AnalysisReport"
CLASSES_SHOWN = 20
MOST_CLASSES = 1000  # classes that a table lists


def page_of(result: Reported, model: Model, analysis: Analysis | None, environment: Environment) -> doc.Document:
    """Return the page of `eval`, `eval --sweep` or `analyze`.

    analysis: of the full model; None: nothing about masses.
    """
    document = doc.with_warnings(document_of(result), result.warnings)
    blocks: list[doc.Block] = []
    if isinstance(result, Evaluation):
        blocks += [doc.Highlights(list(_highlights(result))), *_summary(result)]
    elif isinstance(result, LanguageEvaluation):
        blocks += [doc.Highlights(list(language.highlights(result))), doc.Heading("Size and FLOPs"), _costs(result)]
    elif isinstance(result, Sweep):
        blocks.append(doc.Highlights(list(highlights(result.rows))))
        blocks += [doc.Heading("Accuracy over size and FLOPs"), trade_off(result.rows)]
    blocks += document.blocks
    if isinstance(result, Evaluation) and result.forgetting is not None:
        blocks += _classes(result.forgetting)
    for name, statistics in analysis.layers.items() if analysis else ():
        blocks += experts_of(name, statistics, model.plan.get(name))
    blocks += [doc.Heading("Where these figures come from"), doc.Facts(_origins(result, model, analysis, environment))]
    return doc.Document(document.title, blocks, document.gates)


def _summary(result: Evaluation) -> Iterator[doc.Block]:
    """Yield the classes that collapsed, and size and FLOPs of the models by part."""
    if result.forgetting is not None and result.forgetting.collapsed:
        collapsed = ", ".join(map(str, result.forgetting.collapsed))
        yield doc.Lines([f"Classes that collapsed, hidden by the average: {collapsed}."])
    yield doc.Heading("Accuracy, size and FLOPs")
    yield _costs(result)


def _costs(result: Evaluation | LanguageEvaluation) -> doc.Figure:
    models = {"model": result.model, "full model": result.baseline_model}
    panels, said = [], []
    for title, figure, unit in (("size", "bytes_by_part", "B"), ("FLOPs per input", "flops_per_input", "")):
        rows = {}
        for name, model in models.items():
            if model is not None:
                parts = {part: n for part, n in asdict(getattr(model, figure)).items() if part != "total"}
                total = amount(sum(parts.values()), unit)
                rows[f"{name}\n{total}"] = parts
                each = ", ".join(f"{part} {amount(value, unit)}" for part, value in parts.items())
                said.append(f"{title} of the {name}: {total} ({each})")
        panels.append(panel(partial(stacks, rows=rows), title, height=0.7 + 0.4 * len(rows)))
    return doc.Figure(panels, "; ".join(said))


def _highlights(result: Evaluation) -> Iterator[tuple[str, str, str]]:
    model, full, difference = result.model, result.baseline_model, result.difference
    accuracy = "95 %: {} to {}".format(*map(percent, model.accuracy_ci95))
    size, flops = amount(model.bytes, "B"), amount(model.flops_per_input.total)
    if difference is None or full is None:
        yield "accuracy", percent(model.accuracy, 2), accuracy
        yield "size", size, ""
        yield "FLOPs per input", flops, ""
        return
    yield "accuracy drop", points(difference.accuracy_drop), ci95(difference.accuracy_drop_ci95)
    yield "accuracy", percent(model.accuracy, 2), f"{accuracy}; full model {percent(full.accuracy, 2)}"
    sizes, counts = f"{amount(full.bytes, 'B')} → {size}", f"{amount(full.flops_per_input.total)} → {flops}"
    yield "size", percent(1 - difference.size_reduction), f"of the full model's: {sizes}"
    yield "FLOPs per input", percent(1 - difference.flops_reduction), f"of the full model's: {counts}"
    flips = f"flips: {difference.outcomes.lost} to wrong, {difference.outcomes.won} to right"
    yield "same prediction", percent(difference.agreement, 2), f"as the full model; {flips}"
    if result.latency is not None:
        slowest, batch = min((row.speedup or 1.0, row.batch_size) for row in result.latency.batches)
        yield "speed-up, at least", f"{slowest:.2f}×", f"at batch {batch}"


def _classes(forgetting: Forgetting) -> Iterator[doc.Block]:
    """Return the change of each class, those that collapsed first."""
    yield doc.Heading("Classes")
    changes = sorted(forgetting.classes, key=lambda change: change.index not in forgetting.collapsed)
    less = sum(change.accuracy_drop_ci95[0] > 0 for change in changes)
    more = sum(change.accuracy_drop_ci95[1] < 0 for change in changes)
    line = f"Of {len(changes)} classes, {less} lost and {more} gained more than chance explains (95 % each)."
    left_out = f"The {len(changes) - MOST_CLASSES} classes that changed least are left out."
    yield doc.Lines([line, left_out] if len(changes) > MOST_CLASSES else [line])
    reach = max(abs(bound) for change in changes for bound in change.accuracy_drop_ci95)
    rows: list[Sequence[doc.Cell]] = []
    for change in changes[:MOST_CLASSES]:
        low, high = (-bound + 0.0 for bound in reversed(change.accuracy_drop_ci95))
        text = f"{points(-change.accuracy_drop)} ({100 * low:+.1f} to {100 * high:+.1f})"
        interval = doc.Interval(text, low, -change.accuracy_drop, high, reach)
        accuracies = percent(change.baseline_accuracy), percent(change.accuracy)
        verdict = doc.Verdict(False, "collapsed") if change.index in forgetting.collapsed else ""
        rows.append((str(change.index), interval, *accuracies, str(change.samples), verdict))
    columns = ("class", "change (95 %)", "full model", "model", "samples", "")
    yield doc.Table(columns, rows, shown=max(CLASSES_SHOWN, len(forgetting.collapsed)))


def _origins(
    result: Reported, model: Model, analysis: Analysis | None, environment: Environment
) -> list[tuple[str, str]]:
    """Return checkpoints, data, plans and environment."""
    facts: dict[str, Any] = {"checkpoint": result.checkpoint}
    if isinstance(result, Evaluation | LanguageEvaluation) and result.baseline is not None:
        facts["full model"] = result.baseline
    facts["data"] = f"{result.data.spec}, {result.data.samples} samples"
    facts["data, SHA-256"] = result.data.fingerprint
    if analysis is not None:
        data = analysis.origin.data
        facts["analysis"] = f"of {data.spec}, {data.samples} samples"
        facts["analysis, SHA-256 of its data"] = data.fingerprint
        facts["analysis, fingerprint of its model"] = analysis.origin.checkpoint
    facts |= {f"plan of {name}": plan_in_words(plan, with_kept=True) for name, plan in model.plan.items()}
    facts |= {f"provenance: {name}": value for name, value in model.details.provenance.items()}
    facts |= {name.replace("_", " "): value for name, value in asdict(environment).items()}
    return [(label, plain(value)) for label, value in facts.items()]
