"""The report of each command: its type, its document, and its JSON Schema."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from moeprune.calibration.results import AnalysisReport, Explained, LayerSummary, Probes
from moeprune.data.tokens import MOST_TOKENS
from moeprune.demo.records import DemoLanguage, Summary
from moeprune.errors import MoepruneError, listed
from moeprune.evaluation.intervals import wilson
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.evaluation.results import Evaluation, ModelFigures
from moeprune.models.results import Export, Inspection, Parity
from moeprune.pruning.results import LanguageSweep, PlanFile, Pruned, Sweep, SweepRow
from moeprune.records import Report, Result
from moeprune.report.costs import cost_changes, cost_rows, latency_table
from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table
from moeprune.report.language import language
from moeprune.report.pruning import pruning
from moeprune.report.sweeps import language_sweep, sweep
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
SAME = 0.99  # share of equal predictions at or above which they are said to stay the same
NEARLY_LINEAR = 0.95  # share of the variance
SURE = 0.95  # if even equal predictions only show less than this share, there are too few samples


def inspection(result: Inspection) -> Document:
    """Return contents, layers and kept experts of a checkpoint."""
    facts = [
        *(_of_text(result) if result.architecture["type"] == "language" else _of_images(result)),
        *_unless_empty(("class names", listed(result.class_names, 10))),
        ("parameters", f"{amount(result.parameters)} ({amount(result.bytes, 'B')})"),
        ("FLOPs per input", flops_in_words(result.flops_per_input)),
    ]
    for title, values in (("source", result.source), ("provenance", result.provenance)):
        facts += [(f"{title}: {name}", plain(value)) for name, value in values.items() if name != "mean_mass"]
    if reading := result.reading:
        unused = f"{plain(_few(reading.dropped))} (the model does not use them)" if reading.dropped else ""
        removed = ", ".join(part for part in (reading.prefix, *(f"{part}." for part in reading.wrappers)) if part)
        facts += _unless_empty(
            ("read as", reading.library),
            ("built with", _assignments(reading.arguments)),
            ("assumed", _assignments(reading.defaults)),
            ("prefixes taken off", plain(removed)),
            ("left out", unused),
            ("parity", _parity(reading.parity)),
        )
    rows, kept, kinds = [], [], dict[str, list[str]]()
    for name, layer in result.layers.items():
        plan = "dense" if layer.plan is None else plan_in_words(layer.plan)
        rows.append((name, str(layer.experts), amount(layer.parameters), plan))
        kinds.setdefault(f"{layer.family}: {plain(layer.settings)}", []).append(name)
        if layer.plan is not None and layer.plan.kept is not None:
            kept.append((f"kept in {name}", plain(layer.plan.kept)))
    for settings, names in kinds.items():
        facts.append(("layers" if len(kinds) == 1 else ", ".join(names), settings))
    layers = Table(("layer", "experts", "parameters", "plan"), rows)
    return Document(result.checkpoint, [Facts(facts), layers, *([Facts(kept)] if kept else [])])


def _of_images(result: Inspection) -> list[tuple[str, str]]:
    architecture = result.architecture
    if architecture["type"] == "module":
        kind = plain(f"{architecture['factory']}({_assignments(architecture['arguments'])})")
        shape = architecture["input_shape"]
    else:
        kind = f"{architecture['type']}, {plural(len(architecture['blocks']), 'block')}, d = {architecture['dim']}"
        shape = [architecture["in_channels"], *architecture["image_size"]]
    preprocessing = ", ".join(f"{key} {plain(value)}" for key, value in result.preprocessing.items())
    preprocessing += "" if result.states_normalisation else " (mean and std are a guess: the file does not state them)"
    return [
        ("model", f"{kind}, {architecture['num_classes']} classes"),
        ("input", f"{' × '.join(map(str, shape))} (channels × height × width)"),
        ("preprocessing", preprocessing),
    ]


def _of_text(result: Inspection) -> list[tuple[str, str]]:
    its, share = result.architecture, percent(result.bytes_by_part.experts / result.bytes)
    tokens = f"{min(MOST_TOKENS, its['longest'])} tokens (at most {its['longest']})"
    return [
        ("model", f"{its['model_type']}, {its['blocks']} blocks"),
        ("input", f"{tokens} of a vocabulary of {its['vocabulary']}"),
        ("experts", f"{share} of the bytes"),
    ]


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
    """Return the spread of the combine mass in each layer, what the probes measured, and what follows from both."""
    columns = (
        "layer", "experts", "best 1/8\nper input", "best 1/8\noverall", "50/90/99 %\nper input", "50/90/99 %\noverall",
        "unused\nexperts",
    )  # fmt: skip
    rows = []
    for name, layer in result.layers.items():
        masses = percent(layer.best_eighth_mass), percent(layer.static_eighth_mass)
        counts = ("/".join(f"{n:.0f}" for n in layer.experts_for_mass_per_input),
                  "/".join(map(str, layer.experts_for_mass_overall)))  # fmt: skip
        rows.append((name, str(layer.experts), *masses, *counts, str(len(layer.unused_experts))))
    uniform = ", ".join(dict.fromkeys(percent(layer.uniform_mass) for layer in result.layers.values()))
    title = f"mass of the best 1/8 (uniform: {uniform}), and experts that hold 50/90/99 %"
    blocks: list[Block] = [Table(columns, rows, title), _probes(result), Lines(list(_findings(result)))]
    return Document(checkpoint_on_data(result.checkpoint, result.data), blocks)


def _probes(result: AnalysisReport) -> Table:
    """Return what happens to the predictions without experts, and with the best 1/8 of each input."""
    measured = "same predictions as the full model" if _has_head(result.probes) else "change of the features"
    title = f"{measured}, without compensation ({plural(result.probes.samples, 'sample')})"
    rows: list[Sequence[Cell] | None] = [(name, *_agreements(layer.probes)) for name, layer in result.layers.items()]
    if len(result.layers) > 1:
        rows += [None, ("all layers", *_agreements(result.probes))]
    return Table(("layer", "no experts", "best 1/8 per input"), rows, title)


def _has_head(probes: Probes) -> bool:
    return probes.no_experts.agreement is not None


def _agreements(probes: Probes) -> Iterator[str]:
    for probe in (probes.no_experts, probes.best_eighth):
        if probe.agreement is None:
            yield percent(probe.divergence)
        else:
            low, high = wilson(probe.agreement * probes.samples, probes.samples)
            yield f"{percent(probe.agreement)} ({100 * low:.1f} to {100 * high:.1f})"


def _findings(result: AnalysisReport) -> Iterator[str]:
    """Yield what the masses and the probes show, layers with the same finding in one sentence."""
    samples, groups = result.probes.samples, dict[str, list[str]]()
    for name, layer in result.layers.items():
        groups.setdefault(_of_mass(layer), []).append(name)
        groups.setdefault(_of_variance(layer.explained), []).append(name)
    surest = wilson(samples, samples)[0]
    if surest < SURE:
        few = f"{plural(samples, 'sample')} cannot tell how pruning changes the predictions"
        groups[f"{few}: even if all stay the same, {percent(surest, 0)} may be true"] = list(result.layers)
    elif _has_head(result.probes):
        for name, layer in result.layers.items():
            if layer.experts > 1:
                groups.setdefault(_of_probes(layer.probes), []).append(name)
        if len(result.layers) > 1:
            groups.setdefault(_of_probes(result.probes), []).append("all layers at once")
    for sentence, names in groups.items():
        is_all = len(names) == len(result.layers) > 1 and "all layers at once" not in names
        yield f"{'all layers' if is_all else ', '.join(names)}: {sentence}"
    yield "compensation is not measured here: `moeprune eval --sweep 1/8` does so, beside random and no experts"


def _of_mass(layer: LayerSummary) -> str:
    """Return in words whether the combine mass distinguishes experts."""
    if layer.experts == 1:
        return "one expert: nothing to prune"
    if layer.informative:
        text = "the combine signal is informative: few experts hold much of an input's mass"
    else:
        text = "the combine signal is weak: an input's mass is spread over many experts"
    return text if "static" in layer.scopes else f"{text} (scope `static` is not possible)"


def _of_variance(explained: Explained) -> str:
    """Return in words what explains the layer's output."""
    text = f"of the output's variance a linear map explains {percent(explained.linear)}, the router with constants"
    text += f" {percent(explained.router)}, both {percent(explained.both)}; only the experts explain"
    text += f" {percent(1 - explained.both)}"
    return f"{text} (nearly linear: try `--compensate linear`)" if explained.linear >= NEARLY_LINEAR else text


def _of_probes(probes: Probes) -> str:
    """Return in words with how many experts the predictions stay the same."""
    same = f"{percent(SAME, 0)} of the predictions or more stay the same"
    if (probes.no_experts.agreement or 0) >= SAME:
        return f"{same} without any experts"
    if (probes.best_eighth.agreement or 0) >= SAME:
        return f"{same} with the best 1/8 of each input, fewer without experts"
    return f"fewer than {same.replace(' or more', '')} even with the best 1/8 of each input: compensate, or keep more"


def evaluation(result: Evaluation) -> Document:
    """Return figures of the model, alone or beside the full model's, latency and gates."""
    full, difference = result.baseline_model, result.difference
    labels, figures = zip(*_figures(result.model), strict=True)
    columns = {"": labels, "model": figures}
    if full and difference:
        changes = {
            "accuracy": points(-difference.accuracy_drop),
            "top-5 accuracy": points(result.model.top5_accuracy - full.top5_accuracy),
            **cost_changes(difference.size_reduction, difference.flops_reduction),
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
    if shifted := [name for name, shift in result.shift.items() if shift.is_shifted]:
        text = "the data is not like the calibration data: larger errors than predicted in"
        blocks.append(Lines([f"{text} {listed(shifted)} (see the warning)"]))
    if result.latency:
        blocks.append(latency_table(result.latency, result.environment.device))
    return Document(checkpoint_on_data(result.checkpoint, result.data), blocks, result.gates)


def _figures(model: ModelFigures) -> list[tuple[str, str]]:
    """Return labels and values."""
    low, high = model.accuracy_ci95
    return [
        ("accuracy", f"{percent(model.accuracy, 2)} ({100 * low:.1f} to {100 * high:.1f})"),
        ("top-5 accuracy", percent(model.top5_accuracy, 2)),
        ("loss", f"{model.loss:.4f}"),
        *cost_rows(model),
    ]


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
            way = f"auto: {_compensation(by_keep[last])} at {last}" if label == "auto" else label or ""
            rows.append([way, *(_retained(by_keep[keep]) for keep in keeps), *_remaining(by_keep[last])])
        rows.append(None)
        for row in others:
            if row.keep == "0":
                label = row.label if row.compensate == "linear" else f"no experts at all: {row.compensate}"
                rows.append([label or "", _retained(row), *[""] * (len(keeps) - 1), *_remaining(row)])
        data = f"{model.data.spec} ({model.data.samples} samples)"
        tables.append(Table(columns, rows, f"{model.title}: full model {percent(full.accuracy, 2)} on {data}"))
    if result.language is not None:
        tables.append(_language(result.language))
    return Document(f"wrote checkpoints, analyses and evaluations into {result.directory}", tables)


def _language(result: DemoLanguage) -> Table:
    """Return a table of the increase of the loss: methods in rows, kept shares in columns."""
    full, *others = result.rows
    keeps = list(dict.fromkeys(row.keep for row in others))
    rows: list[Sequence[Cell] | None] = []
    for label in dict.fromkeys(row.label for row in others):
        by_keep = {row.keep: row for row in others if row.label == label}
        last = by_keep[keeps[-1]].difference
        increases = (f"{by_keep[keep].difference.loss_increase:+.3f}" for keep in keeps)
        costs = percent(1 - last.size_reduction), percent(1 - last.flops_reduction)
        rows.append([label or "", *increases, percent(last.agreement), *costs])
    last_keep = keeps[-1]
    shares = (f"{keep}\nkept" for keep in keeps)
    of_last = (f"{what}\nat {last_keep}" for what in ("same token", "size", "FLOPs"))
    data = f"{result.data.spec} ({result.data.samples} samples)"
    title = f"{result.title}: full model {full.model.loss:.3f} nats per token on {data}"
    return Table(("increase of the loss\nin nats per token", *shares, *of_last), rows, title)


def _compensation(row: SweepRow) -> str:
    return row.compensate or "" if row.rank is None else f"{row.compensate} {row.rank:g}"


def _remaining(row: SweepRow) -> tuple[str, str]:
    return percent(row.size), percent(row.flops)


def _retained(row: SweepRow) -> str:
    if row.retained is None:
        return ""
    if row.accuracy_sd is None or not row.accuracy:
        return percent(row.retained)
    return f"{percent(row.retained)} ± {100 * row.accuracy_sd * row.retained / row.accuracy:.0f}"


COMMANDS: dict[str, tuple[type[Result], Callable[[Any], Document] | None]] = {
    "analyze": (AnalysisReport, analysis),
    "demo": (Summary, demo),
    "eval": (Evaluation, evaluation),
    "eval-language": (LanguageEvaluation, language),
    "export": (Export, export),
    "inspect": (Inspection, inspection),
    "plan": (PlanFile, None),
    "prune": (Pruned, pruning),
    "sweep": (Sweep, sweep),
    "sweep-language": (LanguageSweep, language_sweep),
}
"""`eval-language`, `sweep` and `sweep-language` are what `eval` reports of language models and of sweeps, `plan` what
`prune` reads."""
TYPES = {command: kind for command, (kind, _) in COMMANDS.items()}


def document_of(result: Report, verbose: bool = False) -> Document:
    """Return the report that text, Markdown and CI formats show; verbose: with the experts that `prune` keeps."""
    if isinstance(result, Pruned):
        return pruning(result, with_kept=verbose)
    return next(make(result) for kind, make in COMMANDS.values() if make and kind is type(result))


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the JSON report of a command, one of TYPES."""
    if command not in TYPES:
        raise MoepruneError(f"no schema for `{command}`", f"give one of {', '.join(TYPES)}")
    schema = msgspec.json.schema(TYPES[command])
    for name, definition in schema.get("$defs", {}).items():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
        if "properties" in definition and name != "LayerPlan":
            definition["required"] = sorted(definition["properties"])  # reports leave nothing out
    if command == "plan":  # whose fields have defaults
        layer = schema["$defs"]["LayerPlan"]
        is_list = {"properties": {"kept": {"type": "array"}}}
        layer |= {"required": [], "anyOf": [{"required": ["k"]}, {"required": ["kept"], **is_list}]}
        layer["additionalProperties"] = False
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
