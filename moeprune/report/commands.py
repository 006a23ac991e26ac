"""The report of each command: its type, its document, and its JSON Schema."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import asdict

from moeprune.calibration.results import AnalysisReport, LayerSummary
from moeprune.demo.records import Summary
from moeprune.errors import MoepruneError
from moeprune.evaluation.results import Evaluation, Latency, ModelFigures
from moeprune.models.results import Export, Inspection, Parity
from moeprune.pruning.results import PlanFile, Pruned, Sweep, SweepRow
from moeprune.records import Report
from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table
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

WORST_CLASSES = 3


def inspection(result: Inspection) -> Document:
    """Return contents, layers and kept experts of a checkpoint."""
    architecture = result.architecture
    if architecture["type"] == "module":
        kind = plain(f"{architecture['factory']}({_assignments(architecture['arguments'])})")
        shape = architecture["input_shape"]
    else:
        kind = f"{architecture['type']}, {plural(len(architecture['blocks']), 'block')}, d = {architecture['dim']}"
        shape = [architecture["in_channels"], *architecture["image_size"]]
    facts = [
        ("model", f"{kind}, {architecture['num_classes']} classes"),
        ("input", f"{' × '.join(map(str, shape))} (channels × height × width)"),
        ("preprocessing", ", ".join(f"{key} {plain(value)}" for key, value in result.preprocessing.items())),
        ("parameters", f"{amount(result.parameters)} ({amount(result.bytes, 'B')})"),
        ("FLOPs per input", flops_in_words(result.flops_per_input)),
    ]
    for title, values in (("source", result.source), ("provenance", result.provenance)):
        facts += [(f"{title}: {name}", plain(value)) for name, value in values.items()]
    if reading := result.reading:
        unused = f"{plain(_few(reading.dropped))} (the model does not use them)" if reading.dropped else ""
        removed = ", ".join(part for part in (reading.prefix, *(f"{part}." for part in reading.wrappers)) if part)
        facts += _unless_empty(
            ("read as", reading.library),
            ("built with", _assignments(reading.arguments)),
            ("taken from the library's defaults", _assignments(reading.defaults)),
            ("prefixes taken off", plain(removed)),
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


def export(result: Export) -> Document:
    """Return what was written, and how well the library's own model agrees."""
    facts = _unless_empty(
        ("to", result.to),
        ("model", f"{amount(result.model.parameters)} parameters"),
        ("built with", _assignments(result.arguments)),
        ("parity", _parity(result.parity)),
    )
    blocks: list[Block] = [Facts(facts)]
    if result.layers:
        built = ((name, f"{of.class_name}({_assignments(of.arguments)})") for name, of in result.layers.items())
        blocks.append(Lines(["Your code has to build these layers this way before it loads the file:"]))
        blocks.append(Facts([(name or "the model", how) for name, how in built]))
    return Document(f"wrote {result.output}", blocks)


def _unless_empty(*facts: tuple[str, str]) -> list[tuple[str, str]]:
    return [(label, text) for label, text in facts if text]


def _parity(parity: Parity) -> str:
    if parity.max_relative_difference is None:
        return f"not measured: {parity.skipped}"
    most = f"{parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
    return f"logits of {parity.images} random images differ by at most {most}"


def _few(names: Sequence[str], limit: int = 3) -> list[str]:
    rest = len(names) - limit
    return [*names[:limit], *([f"and {rest} more"] if rest > 0 else [])]


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
        text = f"the combine signal is weak: {held} (uniform: {uniform}), so dropping the others costs much."
        return f"{text} Compensate (`--compensate affine`), and compare with `random` and no experts at all in a sweep"
    text = f"the combine signal is informative: {held}, one set for all inputs {static}, a uniform router's {uniform}."
    text += " Without compensation, scope `input` loses least"
    if "static" not in layer.scopes:
        return text + " (this layer cannot be pruned with scope `static`)"
    return f"{text}; `static` with `--signal gram --compensate affine` often keeps more, and shrinks the file"


def pruning(result: Pruned) -> Document:
    """Return size, FLOPs, the confirmed accuracy drop, and the plan of each layer."""
    facts: list[tuple[str, str]] = []
    if result.model is not None:
        full, pruned = result.full_model, result.model
        is_adaptive = any(plan.mass is not None for plan in result.plan.values())  # FLOPs depend on the input
        sizes = f"{amount(full.bytes, 'B')} → {amount(pruned.bytes, 'B')} ({percent(pruned.bytes / full.bytes)})"
        most, measured = ("at most ", " (eval measures it)") if is_adaptive else ("", "")
        flops = f"{amount(full.flops_per_input.total)} → {most}{flops_in_words(pruned.flops_per_input)}"
        share = percent(pruned.flops_per_input.total / full.flops_per_input.total)
        facts += [("size", sizes), ("FLOPs per input", f"{flops}, {share}{measured}")]
    if result.search is not None:
        found, tried = result.search.confirmed, len(result.search.tried)
        bound = "" if found.bound is None else f"; at most {points(found.bound)} with confidence {found.confidence:g}"
        drop = f"{points(found.accuracy_drop)} ({ci95(found.accuracy_drop_ci95)}{bound})"
        sample = f"{found.samples} samples that were not searched ({tried} plans tried)"
        facts.append(("accuracy drop", f"{drop} on {sample}"))
    facts += [(name, plan_in_words(plan, with_kept=True)) for name, plan in result.plan.items()]
    written = [path for path in (result.checkpoint, result.saved_plan) if path is not None]
    return Document(f"wrote {' and '.join(written)}", [Facts(facts)])


def evaluation(result: Evaluation) -> Document:
    """Return figures of the model, alone or beside the full model's, latency and gates."""
    full, difference = result.baseline_model, result.difference
    labels, figures = zip(*_figures(result.model), strict=True)
    columns = {"": labels, "model": figures}
    if full and difference:
        changes = {
            "accuracy": points(-difference.accuracy_drop),
            "top-5 accuracy": points(result.model.top5_accuracy - full.top5_accuracy),
            "size": f"{-100 * difference.size_reduction:+.1f} %",
            "FLOPs per input": f"{-100 * difference.flops_reduction:+.1f} %",
        }
        columns["full model"] = tuple(text for _, text in _figures(full))
        columns["difference"] = tuple(changes.get(label, "") for label in labels)
    blocks: list[Block] = [Table(tuple(columns), [*zip(*columns.values(), strict=True)])]
    if difference and result.forgetting:
        drop, p = points(difference.accuracy_drop), f"{difference.mcnemar_p:.3g}"
        line = f"accuracy drop {drop} ({ci95(difference.accuracy_drop_ci95)}; McNemar p = {p}),"
        line += f" same prediction as the full model on {percent(difference.agreement, 2)}"
        lost, won = len(result.forgetting.lost), len(result.forgetting.won)
        flips = f"inputs that flip: {lost} from right to wrong, {won} from wrong to right"
        worst = [
            f"{each.index} ({percent(each.baseline_accuracy, 0)} → {percent(each.accuracy, 0)} of {each.samples})"
            for each in result.forgetting.classes[:WORST_CLASSES]
            if each.accuracy_drop > 0
        ]
        flips += f"; classes that lost most: {', '.join(worst)}" if worst else ""
        blocks.append(Lines([line, flips]))
    if result.latency:
        blocks.append(_latency(result.latency, result.environment.device))
    return Document(checkpoint_on_data(result.checkpoint, result.data), blocks, result.gates)


def _figures(model: ModelFigures) -> list[tuple[str, str]]:
    """Return labels and values; parts of the figure above them are indented."""
    low, high = model.accuracy_ci95
    total, *flops = asdict(model.flops_per_input).items()
    return [
        ("accuracy", f"{percent(model.accuracy, 2)} ({100 * low:.1f} to {100 * high:.1f})"),
        ("top-5 accuracy", percent(model.top5_accuracy, 2)),
        ("loss", f"{model.loss:.4f}"),
        ("experts per input", f"{model.experts_per_input:.4g}"),
        ("parameters", amount(model.parameters)),
        ("size", amount(model.bytes, "B")),
        *((f"  {part}", amount(size, "B")) for part, size in asdict(model.bytes_by_part).items()),
        ("FLOPs per input", amount(total[1])),
        *((f"  {part}", amount(count)) for part, count in flops),
    ]


def _latency(latency: Latency, device: str) -> Table:
    where = device if device != "cpu" else f"cpu with {plural(latency.threads, 'thread')}"
    rows = []
    for batch in latency.batches:
        row = {"batch": str(batch.batch_size)}
        model = {"model": _seconds(batch.model_seconds, batch.model_seconds_iqr)}
        if batch.speedup and batch.speedup_iqr and batch.baseline_seconds and batch.baseline_seconds_iqr:
            low, high = batch.speedup_iqr
            row["speed-up"] = f"{batch.speedup:.2f}× ({low:.2f} to {high:.2f})"
            model["full model"] = _seconds(batch.baseline_seconds, batch.baseline_seconds_iqr)
        rows.append(row | model | {"repetitions": str(batch.repetitions)})
    title = f"latency on {where}: median (middle half) of the repetitions"
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows], title)


def _seconds(median: float, quartiles: Sequence[float]) -> str:
    """Return all three in the unit of the median: `1.23 ms (1.2 to 1.31)`."""
    scale, unit = (1.0, "s") if median >= 0.9995 else (1e-3, "ms") if median >= 0.9995e-3 else (1e-6, "µs")
    middle, low, high = (f"{float(f'{value / scale:.3g}'):g}" for value in (median, *quartiles))
    return f"{middle} {unit} ({low} to {high})"


def sweep(result: Sweep) -> Document:
    """Return a row for each way to prune."""
    how = ("kept", "scope", "signal", "compensation")
    columns = (*how, "accuracy", "of full", "same as full", "size", "FLOPs")
    rows: list[Sequence[Cell] | None] = []
    for before, row in zip((None, *result.rows), result.rows, strict=False):
        if before is not None and before.keep != row.keep:
            rows.append(None)
        deviation = "" if row.accuracy_sd is None else f" ± {100 * row.accuracy_sd:.1f}"
        accuracy = percent(row.accuracy, 2) + deviation
        retained = "" if row.retained is None else percent(row.retained)
        way = row.keep, row.scope or "full model", row.signal or "", row.compensate or ""
        rows.append((*way, accuracy, retained, percent(row.agreement), *_remaining(row)))
    draws = max(row.draws for row in result.rows)
    notes = [f"random: mean ± standard deviation of {draws} draws. Size and FLOPs: of the whole model."]
    if result.plot is not None:
        notes.append(f"drawn in {result.plot}")
    return Document(checkpoint_on_data(result.checkpoint, result.data), [Table(columns, rows), Lines(notes)])


def demo(result: Summary) -> Document:
    """Return a table for each model: methods in rows, kept shares in columns."""
    tables = []
    for model in result.models.values():
        full, *others = model.rows
        pruned = [row for row in others if row.keep != "0"]
        keeps = list(dict.fromkeys(row.keep for row in pruned))
        last = keeps[-1]
        shares = (f"{keep}\nkept" for keep in keeps)
        columns = ("accuracy as a share\nof the full model's", *shares, f"size\nat {last}", f"FLOPs\nat {last}")
        rows: list[Sequence[Cell] | None] = []
        for label in dict.fromkeys(row.label for row in pruned):
            by_keep = {row.keep: row for row in pruned if row.label == label}
            rows.append([label or "", *(_retained(by_keep[keep]) for keep in keeps), *_remaining(by_keep[last])])
        rows.append(None)
        for row in others:
            if row.keep == "0":
                label = f"no experts at all: {row.compensate}"
                rows.append([label, _retained(row), *[""] * (len(keeps) - 1), *_remaining(row)])
        data = f"{model.data.spec} ({model.data.samples} samples)"
        tables.append(Table(columns, rows, f"{model.title}: full model {percent(full.accuracy, 2)} on {data}"))
    return Document(f"wrote checkpoints, analyses and evaluations into {result.directory}", tables)


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
    schema = msgspec.json.schema(TYPES[command])
    for definition in schema.get("$defs", {}).values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    if command == "plan":  # whose fields have defaults
        layer = schema["$defs"]["LayerPlan"]
        is_list = {"properties": {"kept": {"type": "array"}}}
        layer |= {"required": [], "anyOf": [{"required": ["k"]}, {"required": ["kept"], **is_list}]}
        layer["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
