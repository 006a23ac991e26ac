"""The report of each command: its type, its document, and its JSON Schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from moeprune.calibration.results import AnalysisReport, LayerSummary
from moeprune.demo.records import DemoModel, Summary
from moeprune.errors import MoepruneError
from moeprune.evaluation.results import Evaluation
from moeprune.models.results import Export, Inspection, ModelCost, Parity
from moeprune.pruning.results import PlanFile, Pruned, Search, Sweep, SweepRow
from moeprune.records import Report, json_schema
from moeprune.report.document import Cell, Document, Facts, Lines, Table
from moeprune.report.evaluation import evaluation
from moeprune.report.words import (
    amount,
    checkpoint_on_data,
    ci95,
    flops_in_words,
    percent,
    plain,
    plan_in_words,
    plural,
    points,
)  # fmt: skip


def inspection(result: Inspection) -> Document:
    """Return contents, layers and kept experts of a checkpoint."""
    kind, shape = _architecture(result.architecture)
    facts = [
        ("model", f"{kind}, {result.architecture['num_classes']} classes"),
        ("input", f"{' × '.join(map(str, shape))} (channels × height × width)"),
        ("preprocessing", ", ".join(f"{key} {plain(value)}" for key, value in result.preprocessing.items())),
        ("parameters", f"{amount(result.parameters)} ({amount(result.bytes, 'B')})"),
        ("FLOPs per input", flops_in_words(result.flops_per_input)),
    ]
    for title, values in (("source", result.source), ("provenance", result.provenance)):
        facts += [(f"{title}: {name}", plain(value)) for name, value in values.items()]
    if reading := result.reading:
        unused = f"{plain(reading.dropped)} (the model does not use them)" if reading.dropped else ""
        facts += _unless_empty(
            ("read as", reading.library),
            ("built with", _assignments(reading.arguments)),
            ("taken from the library's defaults", _assignments(reading.defaults)),
            ("left out", unused),
            ("parity", _parity(reading.parity)),
        )
    rows, kept = [], []
    for name, layer in result.layers.items():
        plan = "dense" if layer.plan is None else plan_in_words(layer.plan)
        size = amount(layer.parameters)
        rows.append((name, layer.family, str(layer.experts), size, plain(layer.settings), plan))
        if layer.plan is not None and layer.plan.kept is not None:
            kept.append((f"kept in {name}", plain(layer.plan.kept)))
    layers = Table(("layer", "family", "experts", "parameters", "settings", "plan"), rows)
    return Document(result.checkpoint, [Facts(facts), layers, *([Facts(kept)] if kept else [])])


def _architecture(architecture: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return the kind of model, and the shape of an input."""
    if architecture["type"] == "module":
        arguments = _assignments(architecture["arguments"])
        return plain(f"{architecture['factory']}({arguments})"), architecture["input_shape"]
    depth = plural(len(architecture["blocks"]), "block")
    kind = f"{architecture['type']}, {depth}, d = {architecture['dim']}"
    return kind, [architecture["in_channels"], *architecture["image_size"]]


def export(result: Export) -> Document:
    """Return what was written, and how well the library's own model agrees."""
    facts = _unless_empty(
        ("to", result.to),
        ("model", f"{amount(result.model.parameters)} parameters"),
        ("built with", _assignments(result.arguments)),
        ("parity", _parity(result.parity)),
    )
    return Document(f"wrote {result.output}", [Facts(facts)])


def _unless_empty(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    return [(label, text) for label, text in facts if text]


def _parity(parity: Parity) -> str:
    if parity.max_relative_difference is None:
        return f"not measured: {parity.skipped}"
    most = f"{parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
    return f"logits of {parity.images} random images differ by at most {most}"


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def analysis(result: AnalysisReport) -> Document:
    """Return the spread of the combine mass in each layer, and advice."""
    columns = (
        "layer", "experts", "mass of the best 1/8\nper input", "\none set for all", "\nuniform router",
        "experts with 50 / 90 / 99 %\nper input", "\nover all inputs", "unused\nexperts",
    )  # fmt: skip
    rows, advice = [], []
    for name, layer in result.layers.items():
        masses = map(percent, (layer.best_eighth_mass, layer.static_eighth_mass, layer.uniform_mass))
        per_input = " / ".join(f"{count:.1f}" for count in layer.experts_for_mass_per_input)
        overall = " / ".join(map(str, layer.experts_for_mass_overall))
        rows.append((name, str(layer.experts), *masses, per_input, overall, str(len(layer.unused_experts))))
        advice.append(f"{name}: {_advice(layer)}")
    return Document(checkpoint_on_data(result.checkpoint, result.data), [Table(columns, rows), Lines(advice)])


def _advice(layer: LayerSummary) -> str:
    """Return in words whether the combine mass distinguishes experts, and what to try."""
    n = layer.experts
    if n == 1:
        return "one expert: nothing to prune"
    masses = layer.best_eighth_mass, layer.static_eighth_mass, layer.uniform_mass
    best, static, uniform = (percent(mass, 0) for mass in masses)
    held = f"the best {max(1, n // 8)} of {n} experts hold {best} of an input's mass"
    if not layer.informative:
        return (
            f"the combine signal is weak: {held} (uniform: {uniform}),"
            " so dropping the others costs much. Compensate (`--compensate affine`), and compare with"
            " `random` and no experts at all in a sweep"
        )
    text = (
        f"the combine signal is informative: {held}, one set for all inputs {static}, a uniform router's {uniform}."
        " Without compensation, scope `input` loses least"
    )
    if "static" not in layer.scopes:
        return text + " (this layer cannot be pruned with scope `static`)"
    return f"{text}; `static` with `--signal gram --compensate affine` often keeps more, and shrinks the file"


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
    title = f"{model.title}: full model {percent(full.accuracy, 2)} on {model.data.spec} ({model.data.samples} samples)"
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


COMMANDS: dict[str, tuple[type[Report], Callable[[Any], Document] | None]] = {
    "analyze": (AnalysisReport, analysis),
    "demo": (Summary, demo),
    "eval": (Evaluation, evaluation),
    "export": (Export, export),
    "inspect": (Inspection, inspection),
    "plan": (PlanFile, None),
    "prune": (Pruned, pruning),
    "sweep": (Sweep, sweep),
}
"""`sweep` is what `eval --sweep` reports, `plan` what `prune --plan` reads."""
TYPES = {command: kind for command, (kind, _) in COMMANDS.items()}


def document_of(result: Report) -> Document:
    """Return the report that text, Markdown and CI formats show."""
    return next(make(result) for kind, make in COMMANDS.values() if make and kind is type(result))


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the JSON report of a command, one of TYPES."""
    if command not in TYPES:
        raise MoepruneError(f"no schema for `{command}`", f"give one of {', '.join(TYPES)}")
    schema = json_schema(TYPES[command])
    if command == "plan":  # whose fields have defaults
        layer = schema["$defs"]["LayerPlan"]
        is_list = {"properties": {"kept": {"type": "array"}}}
        layer |= {"required": [], "anyOf": [{"required": ["k"]}, {"required": ["kept"], **is_list}]}
        layer["additionalProperties"] = False
    return schema
