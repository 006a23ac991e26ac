"""What the commands show a person, made from the same JSON values that they give to a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

WORST_CLASSES = 3


def percent(share: float, digits: int = 1) -> str:
    """A share as percent: `0.125` is `12.5 %`."""
    return f"{100 * share:.{digits}f} %"


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


def inspection(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune inspect`."""
    architecture, preprocessing = found["architecture"], found["preprocessing"]
    facts = _facts()
    if architecture["type"] == "module":
        arguments = ", ".join(f"{key}={value!r}" for key, value in architecture["arguments"].items())
        kind = _plain(f"{architecture['factory']}({arguments})")
        shape = architecture["input_shape"]
    else:
        kind = f"{architecture['type']}, {len(architecture['blocks'])} blocks, d = {architecture['dim']}"
        shape = [architecture["in_channels"], *architecture["image_size"]]
    facts.add_row("model", f"{kind}, {architecture['num_classes']} classes")
    facts.add_row("input", f"{' × '.join(map(str, shape))} (channels × height × width)")
    facts.add_row(
        "preprocessing", ", ".join(f"{key} {_plain(value)}" for key, value in preprocessing.items())
    )
    facts.add_row("parameters", f"{amount(found['parameters'])} ({amount(found['bytes'], 'B')})")
    facts.add_row("FLOPs per input", _flops(found["flops_per_input"]))
    for key in ("source", "provenance"):
        for name, value in found[key].items():
            facts.add_row(f"{key}: {name}", _plain(value))
    layers = _table("layer", "experts", "slots", "hidden", "parameters", "plan")
    kept = _facts()
    for name, layer in found["layers"].items():
        plan = layer["plan"]
        layers.add_row(
            name,
            str(layer["experts"]),
            str(layer["slots_per_expert"]),
            "" if layer["hidden_dim"] is None else str(layer["hidden_dim"]),
            amount(layer["parameters"]),
            "dense" if plan is None else _plan(plan),
        )
        if plan is not None and plan["kept"] is not None:
            kept.add_row(f"kept in {name}", _plain(plan["kept"]))
    parts: list[RenderableType] = [Text(found["checkpoint"], style="bold"), facts, Text(), layers]
    if kept.rows:
        parts += [Text(), kept]
    return Group(*parts)


def analysis(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune analyze`."""
    table = _table(
        "layer", "experts", "mass of the best 1/8\nper input", "\none set for all", "\nuniform router",
        "experts with 50 / 90 / 99 %\nper input", "\nover all inputs", "unused\nexperts",
    )  # fmt: skip
    for name, layer in found["layers"].items():
        table.add_row(
            name,
            str(layer["experts"]),
            percent(layer["best_eighth_mass"]),
            percent(layer["static_eighth_mass"]),
            percent(layer["uniform_mass"]),
            " / ".join(f"{count:.1f}" for count in layer["experts_for_mass_per_input"]),
            " / ".join(str(count) for count in layer["experts_for_mass_overall"]),
            str(len(layer["unused_experts"])),
        )
    verdicts = [Text(f"{name}: {verdict(layer)}") for name, layer in found["layers"].items()]
    data = found["data"]
    title = Text(f"{found['checkpoint']} on {data['spec']} ({data['samples']} samples)", style="bold")
    compared = [] if found["oracle"] is None else _oracle(found["oracle"])
    return Group(title, table, Text(), *verdicts, *compared)


def _oracle(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """For each layer how good the subsets are that signals pick, and the paper's in words."""
    for name, layer in found["layers"].items():
        if layer["reference"] == "exhaustive":
            comparison = {
                "found_best": "the best\nsubset",
                "as_right": "as right\nas any",
                "percentile": "subsets that are\nno better",
            }
        else:
            comparison = {"as_right": "as right\nas greedy"}
        columns = (
            "experts",
            "signal",
            "accuracy",
            "logit of the\ntrue class",
            "its\nmargin",
            *comparison.values(),
        )
        table = _table(*columns)
        previous = None
        for row in layer["rows"]:
            if row["k"] != previous:
                table.add_section()
                previous = row["k"]
            table.add_row(
                str(row["k"]),
                row["signal"],
                percent(row["accuracy"]),
                f"{row['true_class_logit']:.3f}",
                f"{row['margin']:.3f}",
                *("" if row[key] is None else percent(row[key]) for key in comparison),
            )
        title = (
            f"\n{name} pruned alone, on {found['data']['samples']} samples: {percent(found['accuracy'])} with"
            f" all {layer['experts']} experts, {percent(layer['accuracy_without_experts'])} with none"
        )
        yield Text(title, style="bold")
        yield table
        yield Text("\n" + _paper_in_words(layer))


def _paper_in_words(layer: Mapping[str, Any]) -> str:
    """How often the paper's signal finds the best subset of experts."""
    rows = [row for row in layer["rows"] if row["signal"] == "combine" and row["as_right"] is not None]
    kept = " / ".join(str(row["k"]) for row in rows)
    right = " / ".join(percent(row["as_right"]) for row in rows)
    if layer["reference"] == "greedy":
        return (
            f"combine picks {kept} experts that are as right as those of a greedy search by the label for"
            f" {right} of inputs"
        )
    found = " / ".join(percent(row["found_best"]) for row in rows)
    return (
        f"combine picks the best subset of {kept} experts for {found} of inputs, and one that is as right as"
        f" any for {right}"
    )


def verdict(layer: Mapping[str, Any]) -> str:
    """In plain words: whether the combine mass tells experts apart, and what to try.

    Args:
        layer: what moeprune.statistics.summarize returns.
    """
    n = layer["experts"]
    if n == 1:
        return "one expert: nothing to prune"
    best, static, uniform = (
        percent(layer[key], 0) for key in ("best_eighth_mass", "static_eighth_mass", "uniform_mass")
    )
    if not layer["informative"]:
        return (
            f"the combine signal is weak: the best 1/8 hold {best} of an input's mass (uniform: {uniform}),"
            " so that dropping the others costs much. Compensate (`--compensate lstsq`), and compare with"
            " `random` and no experts at all in a sweep"
        )
    return (
        f"the combine signal is informative: the best 1/8 of each input hold {best} of its mass, one set for"
        f" all inputs {static}, a uniform router's {uniform}. Without compensation scope `input` loses"
        " least; `static` with `--compensate mean` or `lstsq` comes close to it, and shrinks the file"
    )


def pruning(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune prune`."""
    table = _facts()
    full, pruned, search = found["full_model"], found["model"], found["search"]
    if pruned is not None:
        size, flops = pruned["bytes"], pruned["flops_per_input"]["total"]
        table.add_row(
            "size",
            f"{amount(full['bytes'], 'B')} → {amount(size, 'B')} ({percent(size / full['bytes'])})",
        )
        full_flops = full["flops_per_input"]["total"]
        is_adaptive = any(plan["mass"] is not None for plan in found["plan"].values())
        table.add_row(
            "FLOPs per input",
            f"{amount(full_flops)} → {'at most ' if is_adaptive else ''}{_flops(pruned['flops_per_input'])},"
            f" {percent(flops / full_flops)}{' (eval measures it)' if is_adaptive else ''}",
        )
    if search is not None:
        confirmed = search["confirmed"]
        low, high = confirmed["accuracy_drop_ci95"]
        table.add_row(
            "accuracy drop",
            f"{points(confirmed['accuracy_drop'])} (95 %: {points(low)} to {points(high)}) on"
            f" {confirmed['samples']} samples that the search of {len(search['tried'])} plans did not see"
            + (f"; {confirmed['plans']} plans were measured on them" if confirmed["plans"] > 1 else ""),
        )
    for name, plan in found["plan"].items():
        kept = f": {_plain(plan['kept'])}" if plan["kept"] is not None else ""
        table.add_row(name, _plan(plan) + kept)
    written = [path for path in (found["checkpoint"], found["saved_plan"]) if path is not None]
    return Group(Text(f"wrote {' and '.join(written)}", style="bold"), table)


def evaluation(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune eval`."""
    model, baseline, difference = found["model"], found["baseline_model"], found["difference"]
    data = found["data"]
    title = f"{found['checkpoint']} on {data['spec']} ({data['samples']} samples)"
    table = _table("", "model", *(["full model", "difference"] if baseline else []))
    for label, text in _EVALUATION_ROWS:
        row = [label, text(model)]
        if baseline:
            row += [text(baseline), _difference(label, model, baseline, difference)]
        table.add_row(*row)
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    if difference:
        low, high = difference["accuracy_drop_ci95"]
        parts.append(
            Text(
                f"\naccuracy drop {points(difference['accuracy_drop'])}"
                f" (95 %: {points(low)} to {points(high)}; McNemar p = {difference['mcnemar_p']:.3g}),"
                " same prediction as the full model on"
                f" {percent(difference['agreement'], 2)}"
            )
        )
        parts.append(Text(_forgetting(found["forgetting"])))
    if found["latency"]:
        parts += [Text(), *_latency(found["latency"], found["environment"]["device"])]
    if found["gates"]:
        parts += [Text(), gates(found["gates"])]
    return Group(*parts)


def _forgetting(found: Mapping[str, Any]) -> str:
    """Flips, and the classes that lost most."""
    text = (
        f"inputs that flip: {len(found['lost'])} from right to wrong, {len(found['won'])} from wrong to right"
    )
    worst = [entry for entry in found["classes"][:WORST_CLASSES] if entry["accuracy_drop"] > 0]
    classes = [
        f"{entry['class']} ({percent(entry['baseline_accuracy'], 0)} → {percent(entry['accuracy'], 0)} of"
        f" {entry['samples']})"
        for entry in worst
    ]
    return text + (f"; classes that lost most: {', '.join(classes)}" if classes else "")


Row = tuple[str, Callable[[Mapping[str, Any]], str]]


def _parts(figure: str, unit: str = "") -> list[Row]:
    def text(part: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda model: amount(model[figure][part], unit)

    return [(f"  {part}", text(part)) for part in ("experts", "routing", "compensation", "other")]


_EVALUATION_ROWS: list[Row] = [
    (
        "accuracy",
        lambda model: "{} ({} to {})".format(
            percent(model["accuracy"], 2), *(f"{100 * bound:.1f}" for bound in model["accuracy_ci95"])
        ),
    ),
    ("top-5 accuracy", lambda model: percent(model["top5_accuracy"], 2)),
    ("loss", lambda model: f"{model['loss']:.4f}"),
    ("experts per input", lambda model: f"{model['experts_per_input']:.4g}"),
    ("parameters", lambda model: amount(model["parameters"])),
    ("size", lambda model: amount(model["bytes"], "B")),
    *_parts("bytes_by_part", "B"),
    ("FLOPs per input", lambda model: amount(model["flops_per_input"]["total"])),
    *_parts("flops_per_input"),
]


def _difference(
    label: str, model: Mapping[str, Any], baseline: Mapping[str, Any], difference: Mapping[str, Any]
) -> str:
    if label == "accuracy":
        return points(-difference["accuracy_drop"])
    if label == "size":
        return f"{-100 * difference['size_reduction']:+.1f} %"
    if label == "FLOPs per input":
        return f"{-100 * difference['flops_reduction']:+.1f} %"
    if label == "top-5 accuracy":
        return points(model["top5_accuracy"] - baseline["top5_accuracy"])
    return ""


def _latency(latency: Mapping[str, Any], device: str) -> list[RenderableType]:
    threads = latency["threads"]
    where = device if device != "cpu" else f"cpu with {threads} thread{'s' if threads > 1 else ''}"
    rows = [_latency_row(batch) for batch in latency["batches"]]
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    return [Text(f"latency on {where}: median (middle half) of the repetitions"), table]


def _latency_row(batch: Mapping[str, Any]) -> dict[str, str]:
    row = {"batch": str(batch["batch_size"])}
    if batch["speedup"] is not None:
        low, high = batch["speedup_iqr"]
        row["speed-up"] = f"{batch['speedup']:.2f}× ({low:.2f} to {high:.2f})"
    row["model"] = _seconds(batch["model_seconds"], batch["model_seconds_iqr"])
    if batch["baseline_seconds"] is not None:
        row["full model"] = _seconds(batch["baseline_seconds"], batch["baseline_seconds_iqr"])
    return row | {"repetitions": str(batch["repetitions"])}


def _seconds(median: float, quartiles: Iterable[float]) -> str:
    """The three in the unit of the median: `1.23 ms (1.2 to 1.31)`."""
    scale, unit = next(
        (pair for pair in ((1, "s"), (1e-3, "ms")) if median >= 0.9995 * pair[0]), (1e-6, "µs")
    )
    middle, low, high = (f"{float(f'{value / scale:.3g}'):g}" for value in (median, *quartiles))
    return f"{middle} {unit} ({low} to {high})"


def gates(results: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table of gates."""
    level = next((gate["confidence"] for gate in results if gate["confidence"] is not None), None)
    table = _table("gate", "limit", "value", *([f"bound at {100 * level:g} %"] if level else []), "")
    for gate in results:
        bound = "exact" if gate["bound"] is None else f"{gate['bound']:.4g}"
        table.add_row(
            gate["name"] + _GATE_NOTES.get(gate["name"], ""),
            f"{gate['limit']:g}",
            f"{gate['value']:.4g}",
            *([bound] if level else []),
            Text(gate_verdict(gate), style="green" if gate["passed"] else "bold red"),
        )
    return table


def gate_verdict(gate: Mapping[str, Any]) -> str:
    """Whether a gate passed, and if its value alone did, how many samples would decide.

    Args:
        gate: what moeprune.gate.judge returns of it.
    """
    if gate["reason"] != "undecided":
        return "passed" if gate["passed"] else "FAILED"
    unit = "repetitions" if gate["name"] == "min_speedup" else "samples"
    needed = gate["samples_needed"]
    would = "nor would more like them" if needed is None else f"about {_rounded_up(needed):,} would"
    return f"FAILED: {gate['samples']:,} {unit} cannot show it, {would}"


def _rounded_up(number: int) -> int:
    """With two digits: `2345` is `2400`."""
    step = 10 ** max(0, len(str(number)) - 2)
    return -(-number // step) * step


_GATE_NOTES = {"min_speedup": " (lowest of all batch sizes)"}


def conversion(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune convert`."""
    facts = _facts()
    facts.add_row("from", f"{found['checkpoint']} ({found['from']})")
    facts.add_row("to", found["to"])
    facts.add_row("model", f"{amount(found['model']['parameters'])} parameters")
    if found["arguments"]:
        facts.add_row("built with", _assignments(found["arguments"]))
    if found["defaults"]:
        facts.add_row("taken from the library's defaults", _assignments(found["defaults"]))
    if found["dropped"]:
        facts.add_row("left out", f"{_plain(found['dropped'])} (the model does not use them)")
    parity = found["parity"]
    if parity is not None:
        facts.add_row(
            "parity",
            f"logits of {parity['images']} random images differ by at most"
            f" {parity['max_relative_difference']:.1e} of the largest one ({parity['dtype']})",
        )
    else:
        facts.add_row("parity", f"not measured: {found['parity_skipped']}")
    return Group(Text(f"wrote {found['output']}", style="bold"), facts)


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def sweep(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune eval --sweep`: a row for each variant."""
    table = _table(
        "kept", "scope", "signal", "compensation", "accuracy", "of full", "same as full", "size", "FLOPs"
    )
    previous = None
    for row in found["rows"]:
        if row["keep"] != previous:
            table.add_section()
            previous = row["keep"]
        accuracy = percent(row["accuracy"], 2)
        if row["accuracy_sd"] is not None:
            accuracy += f" ± {100 * row['accuracy_sd']:.1f}"
        table.add_row(
            row["keep"],
            row["scope"] or "full model",
            row["signal"] or "",
            row["compensate"] or "",
            accuracy,
            percent(row["retained"]) if row["retained"] is not None else "",
            percent(row["agreement"]),
            percent(1 - row["difference"]["size_reduction"]),
            percent(1 - row["difference"]["flops_reduction"]),
        )
    data = found["data"]
    title = f"{found['checkpoint']} on {data['spec']} ({data['samples']} samples)"
    draws = max(row["draws"] for row in found["rows"])
    note = f"random: mean ± standard deviation of {draws} draws. Size and FLOPs: of the whole model."
    parts: list[RenderableType] = [Text(title, style="bold"), table, Text(note)]
    if found["plot"] is not None:
        parts.append(Text(f"drawn in {found['plot']}"))
    return Group(*parts)


def demo(found: Mapping[str, Any]) -> Group:
    """The text of `moeprune demo`: for each model, methods in rows and kept shares in columns."""
    parts: list[RenderableType] = []
    for model in found["models"].values():
        rows = model["rows"]
        keeps = list(dict.fromkeys(row["keep"] for row in rows if row["keep"] not in ("0", "1")))
        full = next(row for row in rows if row["keep"] == "1")
        data = model["data"]
        title = (
            f"{model['title']}: full model {percent(full['accuracy'], 2)} on {data['spec']}"
            f" ({data['samples']} samples)"
        )
        columns = [*(f"{keep}\nkept" for keep in keeps), f"size\nat {keeps[-1]}", f"FLOPs\nat {keeps[-1]}"]
        table = _table("accuracy as a share\nof the full model's", *columns)
        for label in dict.fromkeys(row["label"] for row in rows if row["keep"] not in ("0", "1")):
            of_label = {row["keep"]: row for row in rows if row["label"] == label}
            last = of_label[keeps[-1]]["difference"]
            table.add_row(
                label,
                *(_retained(of_label[keep]) for keep in keeps),
                percent(1 - last["size_reduction"]),
                percent(1 - last["flops_reduction"]),
            )
        table.add_section()
        for row in rows:
            if row["keep"] == "0":
                size, flops = row["difference"]["size_reduction"], row["difference"]["flops_reduction"]
                cells = [_retained(row), *[""] * (len(keeps) - 1), percent(1 - size), percent(1 - flops)]
                table.add_row(row["label"], *cells)
        parts += [Text(title, style="bold"), table, Text()]
    parts.append(Text(f"Checkpoints, analyses and evaluations are in {found['directory']}"))
    return Group(*parts)


def _retained(row: Mapping[str, Any]) -> str:
    text = percent(row["retained"])
    if row["accuracy_sd"] is not None:
        text += f" ± {100 * row['accuracy_sd'] * row['retained'] / row['accuracy']:.0f}"
    return text


def _plan(plan: Mapping[str, Any]) -> str:
    kept = f"{plan['k']} of {plan['num_experts']}"
    if plan["mass"] is not None:
        kept = f"mass {plan['mass']:g} in at most {kept}"
    rank = "" if plan["rank"] is None else f" in {plan['rank']} directions"
    return f"{plan['scope']}, {kept} by {plan['signal']}, {plan['compensation']}{rank}"


def _flops(flops: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {amount(flops[name])}" for name in flops if name != "total")
    return f"{amount(flops['total'])} ({parts})"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(part) for part in value)
    text = "automatic" if value is None else str(value)
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True, vertical="bottom")
    return table


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
