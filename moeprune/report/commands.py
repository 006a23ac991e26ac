"""What the commands show a person, made from the same JSON values that they give to a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import asdict

from moeprune.calibration.results import AnalysisReport, LayerSummary
from moeprune.demo.results import DemoModel, Summary
from moeprune.evaluation.results import (
    BatchLatency,
    Difference,
    Evaluation,
    Forgetting,
    GateResult,
    Latency,
    ModelFigures,
)
from moeprune.models.results import Conversion, FlopsByPart, Inspection
from moeprune.plan import LayerPlan
from moeprune.pruning.results import Pruned, Sweep, SweepRow
from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table, Verdict

WORST_CLASSES = 3


def percent(share: float, digits: int = 1) -> str:
    """A share as percent: `0.125` is `12.5 %`."""
    return f"{100 * share:.{digits}f} %"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def points(difference: float) -> str:
    """A difference of shares as percentage points, with its sign."""
    return f"{100 * difference + 0.0:+.2f} pt"


def amount(value: float, unit: str = "") -> str:
    """A number with a decimal prefix: `12345` is `12.3 k`."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and (larger := next(prefixes, None)):
        prefix, value = larger, value / 1000
    digits = f"{value:.0f}" if not prefix and float(value).is_integer() else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".strip()


def inspection(found: Inspection) -> Document:
    """The report of `moeprune inspect`."""
    architecture, preprocessing = found.architecture, found.preprocessing
    if architecture["type"] == "module":
        arguments = ", ".join(f"{key}={value!r}" for key, value in architecture["arguments"].items())
        kind = plain(f"{architecture['factory']}({arguments})")
        shape = architecture["input_shape"]
    else:
        depth = _many(len(architecture["blocks"]), "block")
        kind = f"{architecture['type']}, {depth}, d = {architecture['dim']}"
        shape = [architecture["in_channels"], *architecture["image_size"]]
    facts = [
        ("model", f"{kind}, {architecture['num_classes']} classes"),
        ("input", f"{' × '.join(map(str, shape))} (channels × height × width)"),
        ("preprocessing", ", ".join(f"{key} {plain(value)}" for key, value in preprocessing.items())),
        ("parameters", f"{amount(found.parameters)} ({amount(found.bytes, 'B')})"),
        ("FLOPs per input", _flops(found.flops_per_input)),
    ]
    for key in ("source", "provenance"):
        facts += [(f"{key}: {name}", plain(value)) for name, value in getattr(found, key).items()]
    rows, kept = [], []
    for name, layer in found.layers.items():
        plan = layer.plan
        rows.append(
            (
                name,
                str(layer.experts),
                str(layer.slots_per_expert),
                "" if layer.hidden_dim is None else str(layer.hidden_dim),
                amount(layer.parameters),
                "dense" if plan is None else plan_in_words(plan),
            )
        )
        if plan is not None and plan.kept is not None:
            kept.append((f"kept in {name}", plain(plan.kept)))
    blocks: list[Block] = [
        Facts(facts),
        Table(("layer", "experts", "slots", "hidden", "parameters", "plan"), rows),
    ]
    return Document(found.checkpoint, [*blocks, *([Facts(kept)] if kept else [])])


def analysis(found: AnalysisReport) -> Document:
    """The report of `moeprune analyze`."""
    columns = (
        "layer", "experts", "mass of the best 1/8\nper input", "\none set for all", "\nuniform router",
        "experts with 50 / 90 / 99 %\nper input", "\nover all inputs", "unused\nexperts",
    )  # fmt: skip
    rows = [
        (
            name,
            str(layer.experts),
            percent(layer.best_eighth_mass),
            percent(layer.static_eighth_mass),
            percent(layer.uniform_mass),
            " / ".join(f"{count:.1f}" for count in layer.experts_for_mass_per_input),
            " / ".join(str(count) for count in layer.experts_for_mass_overall),
            str(len(layer.unused_experts)),
        )
        for name, layer in found.layers.items()
    ]
    verdicts = [f"{name}: {verdict(layer)}" for name, layer in found.layers.items()]
    return Document(_on_data(found), [Table(columns, rows), Lines(verdicts)])


def _on_data(found: AnalysisReport | Evaluation | Sweep) -> str:
    data = found.data
    return f"{found.checkpoint} on {data.spec} ({data.samples} samples)"


def verdict(layer: LayerSummary) -> str:
    """In plain words: whether the combine mass tells experts apart, and what to try."""
    n = layer.experts
    if n == 1:
        return "one expert: nothing to prune"
    few = f"the best {max(1, n // 8)} of {n} experts"
    best, static, uniform = (
        percent(getattr(layer, key), 0) for key in ("best_eighth_mass", "static_eighth_mass", "uniform_mass")
    )
    if not layer.informative:
        return (
            f"the combine signal is weak: {few} hold {best} of an input's mass (uniform: {uniform}),"
            " so that dropping the others costs much. Compensate (`--compensate affine`), and compare with"
            " `random` and no experts at all in a sweep"
        )
    text = (
        f"the combine signal is informative: {few} hold {best} of an input's mass, one set for all inputs"
        f" {static}, a uniform router's {uniform}. Without compensation scope `input` loses least"
    )
    if "static" not in layer.scopes:
        return text + " (`static` is not possible: slots are made anew from each input's tokens)"
    return f"{text}; `static` with `--signal gram --compensate affine` often keeps more, and shrinks the file"


def pruning(found: Pruned) -> Document:
    """The report of `moeprune prune`."""
    facts: list[tuple[str, str]] = []
    full, pruned, search = found.full_model, found.model, found.search
    if pruned is not None:
        size, flops = pruned.bytes, pruned.flops_per_input.total
        sizes = f"{amount(full.bytes, 'B')} → {amount(size, 'B')} ({percent(size / full.bytes)})"
        facts.append(("size", sizes))
        full_flops = full.flops_per_input.total
        is_adaptive = any(plan.mass is not None for plan in found.plan.values())
        facts.append(
            (
                "FLOPs per input",
                f"{amount(full_flops)} → {'at most ' if is_adaptive else ''}"
                f"{_flops(pruned.flops_per_input)}, {percent(flops / full_flops)}"
                f"{' (eval measures it)' if is_adaptive else ''}",
            )
        )
    if search is not None:
        confirmed = search.confirmed
        low, high = confirmed.accuracy_drop_ci95
        bound = ""
        if confirmed.bound is not None:
            bound = f"; at most {points(confirmed.bound)} with confidence {confirmed.confidence:g}"
        facts.append(
            (
                "accuracy drop",
                f"{points(confirmed.accuracy_drop)} (95 %: {points(low)} to {points(high)}{bound}) on"
                f" {confirmed.samples} samples that were not searched ({len(search.tried)} plans tried)",
            )
        )
    for name, plan in found.plan.items():
        kept = f": {plain(plan.kept)}" if plan.kept is not None else ""
        facts.append((name, plan_in_words(plan) + kept))
    written = [path for path in (found.checkpoint, found.saved_plan) if path is not None]
    return Document(f"wrote {' and '.join(written)}", [Facts(facts)])


def evaluation(found: Evaluation) -> Document:
    """The report of `moeprune eval`."""
    model, baseline, difference = found.model, found.baseline_model, found.difference
    columns = ("", "model", *(("full model", "difference") if baseline else ()))
    rows = []
    for label, text in _EVALUATION_ROWS:
        row = [label, text(model)]
        if baseline and difference:
            row += [text(baseline), _difference(label, model, baseline, difference)]
        rows.append(row)
    blocks: list[Block] = [Table(columns, rows)]
    if difference and found.forgetting:
        low, high = difference.accuracy_drop_ci95
        drop = (
            f"accuracy drop {points(difference.accuracy_drop)}"
            f" (95 %: {points(low)} to {points(high)}; McNemar p = {difference.mcnemar_p:.3g}),"
            f" same prediction as the full model on {percent(difference.agreement, 2)}"
        )
        blocks.append(Lines([drop, _forgetting(found.forgetting)]))
    if found.latency:
        blocks.append(_latency(found.latency, found.environment.device))
    judged = gates(found.gates) if found.gates else None
    return Document(_on_data(found), blocks, judged, found.passed)


def _forgetting(found: Forgetting) -> str:
    """Flips, and the classes that lost most."""
    text = f"inputs that flip: {len(found.lost)} from right to wrong, {len(found.won)} from wrong to right"
    worst = [entry for entry in found.classes[:WORST_CLASSES] if entry.accuracy_drop > 0]
    classes = [
        f"{entry.index} ({percent(entry.baseline_accuracy, 0)} → {percent(entry.accuracy, 0)} of"
        f" {entry.samples})"
        for entry in worst
    ]
    return text + (f"; classes that lost most: {', '.join(classes)}" if classes else "")


Row = tuple[str, Callable[[ModelFigures], str]]


def _parts(figure: str, unit: str = "") -> list[Row]:
    def text(part: str) -> Callable[[ModelFigures], str]:
        return lambda model: amount(getattr(getattr(model, figure), part), unit)

    return [(f"  {part}", text(part)) for part in ("experts", "routing", "compensation", "other")]


_EVALUATION_ROWS: list[Row] = [
    (
        "accuracy",
        lambda model: "{} ({} to {})".format(
            percent(model.accuracy, 2), *(f"{100 * bound:.1f}" for bound in model.accuracy_ci95)
        ),
    ),
    ("top-5 accuracy", lambda model: percent(model.top5_accuracy, 2)),
    ("loss", lambda model: f"{model.loss:.4f}"),
    ("experts per input", lambda model: f"{model.experts_per_input:.4g}"),
    ("parameters", lambda model: amount(model.parameters)),
    ("size", lambda model: amount(model.bytes, "B")),
    *_parts("bytes_by_part", "B"),
    ("FLOPs per input", lambda model: amount(model.flops_per_input.total)),
    *_parts("flops_per_input"),
]


def _difference(label: str, model: ModelFigures, baseline: ModelFigures, difference: Difference) -> str:
    if label == "accuracy":
        return points(-difference.accuracy_drop)
    if label == "size":
        return f"{-100 * difference.size_reduction:+.1f} %"
    if label == "FLOPs per input":
        return f"{-100 * difference.flops_reduction:+.1f} %"
    if label == "top-5 accuracy":
        return points(model.top5_accuracy - baseline.top5_accuracy)
    return ""


def _latency(latency: Latency, device: str) -> Table:
    threads = latency.threads
    where = device if device != "cpu" else f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    rows = [_latency_row(batch) for batch in latency.batches]
    title = f"latency on {where}: median (middle half) of the repetitions"
    return Table(tuple(rows[0]), [tuple(row.values()) for row in rows], title)


def _latency_row(batch: BatchLatency) -> dict[str, str]:
    row = {"batch": str(batch.batch_size)}
    if batch.speedup is not None and batch.speedup_iqr is not None:
        low, high = batch.speedup_iqr
        row["speed-up"] = f"{batch.speedup:.2f}× ({low:.2f} to {high:.2f})"
    row["model"] = _seconds(batch.model_seconds, batch.model_seconds_iqr)
    if batch.baseline_seconds is not None and batch.baseline_seconds_iqr is not None:
        row["full model"] = _seconds(batch.baseline_seconds, batch.baseline_seconds_iqr)
    return row | {"repetitions": str(batch.repetitions)}


def _seconds(median: float, quartiles: Iterable[float]) -> str:
    """The three in the unit of the median: `1.23 ms (1.2 to 1.31)`."""
    scale, unit = next(
        (pair for pair in ((1, "s"), (1e-3, "ms")) if median >= 0.9995 * pair[0]), (1e-6, "µs")
    )
    middle, low, high = (f"{float(f'{value / scale:.3g}'):g}" for value in (median, *quartiles))
    return f"{middle} {unit} ({low} to {high})"


def gates(results: Sequence[GateResult]) -> Table:
    """A table of gates."""
    level = next((gate.confidence for gate in results if gate.confidence is not None), None)
    rows: list[Sequence[Cell]] = [
        (
            gate.name + _GATE_NOTES.get(gate.name, ""),
            f"{gate.limit:g}",
            f"{gate.value:.4g}",
            *(["exact" if gate.bound is None else f"{gate.bound:.4g}"] if level else []),
            Verdict(gate.passed, gate_verdict(gate), gate.reason == "undecided"),
        )
        for gate in results
    ]
    return Table(("gate", "limit", "value", *([f"bound at {100 * level:g} %"] if level else []), ""), rows)


def gate_verdict(gate: GateResult) -> str:
    """Whether a gate passed, and if its value alone did, how many samples would decide."""
    if gate.reason == "undecided":
        return f"FAILED: {_undecided(gate)}"
    return "passed" if gate.passed else "FAILED"


def gate_in_words(gate: GateResult) -> str:
    """What a gate found, its limit and how far apart they are."""
    limit, bound = gate.limit, gate.bound
    words = f"{gate.name} is {gate.value:.4g}, {_distance(gate.value, limit)} the limit of {limit:g}"
    if bound is not None:
        level = f"{100 * (gate.confidence or 0):g} %"
        words += f"; its bound at {level} is {bound:.4g}, {_distance(bound, limit)} the limit"
    return f"{words}: {_undecided(gate)}" if gate.reason == "undecided" else words


def _distance(value: float, limit: float) -> str:
    if value == limit:
        return "at"
    return f"{abs(value - limit):.4g} {'above' if value > limit else 'below'}"


def _undecided(gate: GateResult) -> str:
    unit = "repetitions" if gate.name == "min_speedup" else "samples"
    needed = gate.samples_needed
    would = "nor would more like them" if needed is None else f"about {_rounded_up(needed):,} would"
    return f"{gate.samples:,} {unit} cannot show it, {would}"


def _rounded_up(number: int) -> int:
    """With two digits: `2345` is `2400`."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


_GATE_NOTES = {"min_speedup": " (lowest of all batch sizes)"}


def conversion(found: Conversion) -> Document:
    """The report of `moeprune convert`."""
    facts = [
        ("from", f"{found.checkpoint} ({found.origin})"),
        ("to", found.to),
        ("model", f"{amount(found.model.parameters)} parameters"),
    ]
    if found.arguments:
        facts.append(("built with", _assignments(found.arguments)))
    if found.defaults:
        facts.append(("taken from the library's defaults", _assignments(found.defaults)))
    if found.dropped:
        facts.append(("left out", f"{plain(found.dropped)} (the model does not use them)"))
    parity = found.parity
    if parity is not None:
        measured = (
            f"logits of {parity.images} random images differ by at most"
            f" {parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
        )
    else:
        measured = f"not measured: {found.parity_skipped}"
    facts.append(("parity", measured))
    return Document(f"wrote {found.output}", [Facts(facts)])


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def sweep(found: Sweep) -> Document:
    """The report of `moeprune eval --sweep` and `--frontier`: a row for each variant."""
    columns = (
        "kept", "scope", "signal", "compensation", "accuracy", "of full", "same as full", "size", "FLOPs",
    )  # fmt: skip
    rows: list[Sequence[Cell] | None] = []
    previous = found.rows[0].keep
    for row in found.rows:
        if row.keep != previous:
            rows.append(None)
            previous = row.keep
        accuracy = percent(row.accuracy, 2)
        if row.accuracy_sd is not None:
            accuracy += f" ± {100 * row.accuracy_sd:.1f}"
        rows.append(
            (
                row.keep,
                row.scope or "full model",
                row.signal or "",
                row.compensate or "",
                accuracy,
                percent(row.retained) if row.retained is not None else "",
                percent(row.agreement),
                percent(1 - row.difference.size_reduction),
                percent(1 - row.difference.flops_reduction),
            )
        )
    draws = max(row.draws for row in found.rows)
    notes = [f"random: mean ± standard deviation of {draws} draws. Size and FLOPs: of the whole model."]
    if found.plot is not None:
        notes.append(f"drawn in {found.plot}")
    return Document(_on_data(found), [Table(columns, rows), Lines(notes)])


def demo(found: Summary) -> Document:
    """The report of `moeprune demo`: for each model, methods in rows and kept shares in columns."""
    return Document(
        "wrote checkpoints, analyses and evaluations", [_demo_table(model) for model in found.models.values()]
    )


def _demo_table(model: DemoModel) -> Table:
    of_experts = [row for row in model.rows if row.keep not in ("0", "1")]
    keeps = list(dict.fromkeys(row.keep for row in of_experts))
    full = next(row for row in model.rows if row.keep == "1")
    data = model.data
    title = f"{model.title}: full model {percent(full.accuracy, 2)} on {data.spec} ({data.samples} samples)"
    columns = [*(f"{keep}\nkept" for keep in keeps), f"size\nat {keeps[-1]}", f"FLOPs\nat {keeps[-1]}"]
    rows: list[Sequence[Cell] | None] = []
    for label in dict.fromkeys(row.label for row in of_experts):
        of_label = {row.keep: row for row in of_experts if row.label == label}
        kept = (_retained(of_label[keep]) for keep in keeps)
        rows.append((label or "", *kept, *_remaining(of_label[keeps[-1]])))
    rows.append(None)
    for row in model.rows:
        if row.keep == "0":
            rows.append((row.label or "", _retained(row), *[""] * (len(keeps) - 1), *_remaining(row)))
    return Table(("accuracy as a share\nof the full model's", *columns), rows, title)


def _remaining(row: SweepRow) -> tuple[str, str]:
    """Shares of size and FLOPs that remain."""
    difference = row.difference
    return percent(1 - difference.size_reduction), percent(1 - difference.flops_reduction)


def _retained(row: SweepRow) -> str:
    text = percent(row.retained or 0)
    if row.accuracy_sd is not None:
        text += f" ± {100 * row.accuracy_sd * (row.retained or 0) / row.accuracy:.0f}"
    return text


def plan_in_words(plan: LayerPlan) -> str:
    """What one layer's plan keeps and how."""
    kept = f"{plan.k} of {plan.num_experts}"
    if plan.mass is not None:
        kept = f"mass {plan.mass:g} in at most {kept}"
    rank = ""
    if plan.rank is not None and plan.k < plan.num_experts:
        rank = f" in {_many(plan.rank, 'direction')}"
    return f"{plan.scope}, {kept} by {plan.signal}, {plan.compensation}{rank}"


def _flops(flops: FlopsByPart) -> str:
    parts = ", ".join(f"{name} {amount(value)}" for name, value in asdict(flops).items() if name != "total")
    return f"{amount(flops.total)} ({parts})"


def plain(value: Any) -> str:
    """JSON values as text on one line, without control characters."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    text = "automatic" if value is None else str(value)
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
