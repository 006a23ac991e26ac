"""What `--report` shows: the report of a command, and all that has no place in a terminal.

Figures, every class, every expert, and what the figures rest on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeprune import report
from moeprune.calibration import Analysis
from moeprune.document import (
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
from moeprune.figure import Axis, Bars, Figure, HeatMap, Plot, Series, Stacks
from moeprune.plan import LayerPlan, Plan, plan_to_json
from moeprune.report import amount, percent, plain, plan_in_words, points
from moeprune.statistics import LayerStatistics, summarize

PARTS = ("experts", "routing", "compensation", "other")
NEAR = 0.01
"""Accuracy below the full model's that still counts as near it."""
CLOSE_UP = 0.05
"""Accuracy below the full model's that a figure of its own shows."""
SMALL = 0.25
"""Share of a fair share of the mass, below which an expert stands for no class."""
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
    environment: Mapping[str, Any] = field(default_factory=dict)


def evaluation(found: Mapping[str, Any], background: Background) -> Document:
    """The page of `moeprune eval`.

    Args:
        found: JSON values, like those of the command's other reports.
        background: what it rests on.
    """
    told = report.evaluation(found)
    blocks: list[Block] = [Highlights(list(_highlights(found)))]
    if found["forgetting"] is not None and found["forgetting"]["collapsed"]:
        collapsed = ", ".join(map(str, found["forgetting"]["collapsed"]))
        blocks.append(Lines([f"Collapsed, while the average hides it: class {collapsed}."]))
    blocks += [Heading("Accuracy, size and FLOPs"), _parts(found), *told.blocks]
    if found["forgetting"] is not None:
        blocks += _classes(found["forgetting"])
    blocks += [*_layers(background), *_rests_on(found, background)]
    return Document(told.title, blocks, told.gates, told.passed)


def sweep(found: Mapping[str, Any], background: Background) -> Document:
    """The page of `moeprune eval --sweep` and `--frontier`; see evaluation."""
    told = report.sweep(found)
    blocks = [
        Highlights(list(_best(found["rows"]))),
        Heading("Accuracy over size and FLOPs"),
        *_trade_off(found["rows"]),
        *told.blocks,
        *_layers(background),
        *_rests_on(found, background),
    ]
    return Document(told.title, blocks)


def analysis(found: Mapping[str, Any], background: Background) -> Document:
    """The page of `moeprune analyze`; see evaluation."""
    told = report.analysis(found)
    return Document(told.title, [*told.blocks, *_layers(background), *_rests_on(found, background)])


def _highlights(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    model, full, difference = found["model"], found["baseline_model"], found["difference"]
    if difference is None:
        yield "accuracy", percent(model["accuracy"], 2), _between(model["accuracy_ci95"])
        yield "size", amount(model["bytes"], "B"), ""
        yield "FLOPs per input", amount(model["flops_per_input"]["total"]), ""
        return
    low, high = difference["accuracy_drop_ci95"]
    yield "accuracy drop", points(difference["accuracy_drop"]), f"95 %: {points(low)} to {points(high)}"
    accuracies = f"{_between(model['accuracy_ci95'])}; full model {percent(full['accuracy'], 2)}"
    yield "accuracy", percent(model["accuracy"], 2), accuracies
    sizes = " → ".join(amount(side["bytes"], "B") for side in (full, model))
    yield "size", percent(1 - difference["size_reduction"]), f"of the full model's: {sizes}"
    flops = " → ".join(amount(side["flops_per_input"]["total"]) for side in (full, model))
    yield "FLOPs per input", percent(1 - difference["flops_reduction"]), f"of the full model's: {flops}"
    flips = difference["outcomes"]
    flipped = f"as the full model; flips: {flips['lost']} to wrong, {flips['won']} to right"
    yield "same prediction", percent(difference["agreement"], 2), flipped
    if found["latency"] is not None:
        slowest = min(found["latency"]["batches"], key=lambda batch: batch["speedup"])
        yield "speed-up, at least", f"{slowest['speedup']:.2f}×", f"at batch {slowest['batch_size']}"


def _between(interval: Sequence[float]) -> str:
    return f"95 %: {percent(interval[0])} to {percent(interval[1])}"


def _parts(found: Mapping[str, Any]) -> Figure:
    """Size and FLOPs of the models by part."""
    models = {"model": found["model"], "full model": found["baseline_model"]}
    panels, said = [], []
    for title, figure, unit in (("size", "bytes_by_part", "B"), ("FLOPs per input", "flops_per_input", "")):
        rows = []
        for name, model in models.items():
            if model is not None:
                parts = [model[figure][part] for part in PARTS]
                rows.append((name, amount(sum(parts), unit), parts))
                each = ", ".join(f"{part} {amount(model[figure][part], unit)}" for part in PARTS)
                said.append(f"{title} of the {name}: {amount(sum(parts), unit)} ({each})")
        panels.append(Stacks(title, rows, PARTS))
    return Figure(panels, "; ".join(said))


def _classes(found: Mapping[str, Any]) -> Iterator[Block]:
    """The change of each class, those that collapsed first."""
    yield Heading("Classes")
    entries = sorted(found["classes"], key=lambda entry: entry["class"] not in found["collapsed"])
    less = sum(entry["accuracy_drop_ci95"][0] > 0 for entry in entries)
    more = sum(entry["accuracy_drop_ci95"][1] < 0 for entry in entries)
    text = (
        f"Of {len(entries)} classes {less} lost and {more} gained more than chance explains at 95 %, each"
        " taken by itself."
    )
    beyond = len(entries) - MOST_CLASSES
    yield Lines([text, *([f"The {beyond} classes that changed least are left out."] if beyond > 0 else [])])
    reach = max(abs(bound) for entry in entries for bound in entry["accuracy_drop_ci95"])
    rows: list[Sequence[Cell]] = []
    for entry in entries[:MOST_CLASSES]:
        low, high = (-bound + 0.0 for bound in reversed(entry["accuracy_drop_ci95"]))
        change = f"{points(-entry['accuracy_drop'])} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(
            (
                str(entry["class"]),
                Interval(change, low, -entry["accuracy_drop"], high, reach),
                percent(entry["baseline_accuracy"]),
                percent(entry["accuracy"]),
                str(entry["samples"]),
                Verdict(False, "collapsed") if entry["class"] in found["collapsed"] else "",
            )
        )
    columns = ("class", "change (95 %)", "full model", "model", "samples", "")
    yield Table(columns, rows, shown=max(CLASSES_SHOWN, len(found["collapsed"])))


def _best(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The full model's accuracy, and the cheapest that come near it."""
    full = next(row for row in rows if row["scope"] is None)
    yield "accuracy of the full model", percent(full["accuracy"], 2), f"{len(rows) - 1} ways to prune it"
    near = [row for row in rows if row is not full and row["accuracy"] >= full["accuracy"] - NEAR]
    for name, cost in (("size", _size), ("FLOPs", _flops)):
        label = f"least {name} within {100 * NEAR:g} pt"
        if near:
            row = min(near, key=lambda row: (cost(row), -row["accuracy"]))
            yield label, percent(cost(row)), f"{_way(row)}: accuracy {percent(row['accuracy'], 2)}"
        else:
            yield label, "–", "none of them"


def _size(row: Mapping[str, Any]) -> float:
    return 1 - row["difference"]["size_reduction"]


def _flops(row: Mapping[str, Any]) -> float:
    return 1 - row["difference"]["flops_reduction"]


def _speedup(row: Mapping[str, Any]) -> float:
    return row["latency"]["batches"][0]["speedup"] or 1.0


def _way(row: Mapping[str, Any]) -> str:
    kept = "no expert" if row["keep"] == "0" else row["keep"]
    return f"{kept}, {row['scope']} by {row['signal']}, {row['compensate']}"


def _trade_off(rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """All points, and again those that are close to the full model."""
    full = next(row for row in rows if row["scope"] is None)
    names = list(dict.fromkeys(_kind(row) for row in rows if row is not full))
    on_frontier = sum(row["on_frontier"]["size"] for row in rows)
    description = (
        f"Accuracy of {len(rows) - 1} ways to prune over what remains of size and FLOPs; the table below"
        f" has all of them. {on_frontier} are on the frontier of size."
    )
    yield _panels(rows, full, names, description, "Dashed: no other is as accurate at less cost.")
    low = full["accuracy"] - CLOSE_UP
    close = [row for row in rows if row["accuracy"] >= low]
    if 2 < len(close) < len(rows):
        yield _panels(
            close, full, names, f"The same, from {percent(low)} of accuracy on.", "The same, close up."
        )


def _kind(row: Mapping[str, Any]) -> str:
    """Under which name a row is drawn."""
    if row["label"] is not None:
        return row["label"]
    return "random experts" if row["signal"] == "random" else row["compensate"]


def _panels(
    rows: Sequence[Mapping[str, Any]],
    full: Mapping[str, Any],
    names: Sequence[str],
    description: str,
    caption: str,
) -> Figure:
    costs = [
        ("size", _size, Axis("of the full model's size", "%")),
        ("FLOPs", _flops, Axis("of the full model's FLOPs", "%")),
    ]
    if full["latency"] is not None:
        batch = full["latency"]["batches"][0]["batch_size"]
        costs.append(("speed-up", _speedup, Axis(f"speed-up at batch {batch}", "×")))
    panels = []
    for title, cost, axis in costs:
        series = []
        if title != "speed-up":
            best = sorted((row for row in rows if row["on_frontier"][title.lower()]), key=cost)
            series.append(Series("frontier", [(cost(row), row["accuracy"]) for row in best], "dashes"))
        for color, name in enumerate(names):
            for shape, is_none in (("dots", False), ("crosses", True)):
                own = [
                    row
                    for row in rows
                    if row is not full and _kind(row) == name and (row["keep"] == "0") == is_none
                ]
                if own:
                    label = f"{name}, no expert" if is_none else name
                    series.append(_points(label, own, cost, shape, color))
        series.append(_points("full model", [full], cost, "star", None))
        panels.append(Plot(title, axis, Axis("accuracy", "%"), series))
    return Figure(panels, description, caption)


def _points(name: str, rows: Sequence[Mapping[str, Any]], cost: Any, shape: str, color: int | None) -> Series:
    notes = [
        f"{'full model' if row['scope'] is None else _way(row)}: accuracy {percent(row['accuracy'], 2)},"
        f" size {percent(_size(row))}, FLOPs {percent(_flops(row))}"
        for row in rows
    ]
    return Series(name, [(cost(row), row["accuracy"]) for row in rows], shape, color, notes)


def _layers(background: Background) -> Iterator[Block]:
    """Of each layer: masses, the kept-mass curve, classes, and every expert in numbers."""
    if background.analysis is None:
        return
    for name, statistics in background.analysis.layers.items():
        plan = background.plan.get(name)
        yield Heading(f"Experts of `{name}`")
        yield Lines(list(_in_words(statistics, plan)))
        kept = frozenset(plan.kept or ()) if plan is not None else frozenset()
        yield Figure(
            [_masses(statistics, kept), _curve(statistics, plan)],
            _masses_in_words(statistics),
            "Mass: an expert's share of the combine weights; the masses of one input sum to 1.",
        )
        by_class = _by_class(statistics)
        if by_class:
            yield _class_map(statistics, by_class, kept)
        yield _experts(statistics, by_class, kept, plan)


def _in_words(statistics: LayerStatistics, plan: LayerPlan | None) -> Iterator[str]:
    yield report.verdict(summarize(statistics))
    if plan is None:
        return
    text = plan_in_words(plan_to_json({"": plan})[""])
    if plan.kept is not None:
        mass = float(statistics.mean_mass[list(plan.kept)].sum())
        text += f": the kept experts hold {percent(mass)} of the mass of all inputs"
    elif plan.scope == "input" and plan.mass is None and plan.k:
        mass = float(statistics.kept_mass[plan.k - 1])
        text += f": the best {plan.k} of an input hold {percent(mass)} of its mass"
    yield text


def _by_mass(statistics: LayerStatistics) -> list[int]:
    """Experts, the largest mean mass first."""
    masses = statistics.mean_mass.tolist()
    return sorted(range(len(masses)), key=lambda expert: (-masses[expert], expert))


def _masses(statistics: LayerStatistics, kept: Collection[int]) -> Bars:
    order, masses = _by_mass(statistics), statistics.mean_mass.tolist()
    n = len(order)
    marked = [place for place, expert in enumerate(order) if expert in kept]
    return Bars(
        "mean mass of each expert",
        Axis("experts, the largest first", low=0, high=n),
        Axis("mass", "%", low=0),
        [masses[expert] for expert in order],
        marked,
        ("kept", "dropped"),
        (1 / n, "uniform"),
    )


def _curve(statistics: LayerStatistics, plan: LayerPlan | None) -> Plot:
    n, order, masses = statistics.num_experts, _by_mass(statistics), statistics.mean_mass.tolist()
    overall, total = [(0.0, 0.0)], 0.0
    for k, expert in enumerate(order, start=1):
        total += masses[expert]
        overall.append((k, total))
    best = [(0.0, 0.0), *((float(k), mass) for k, mass in enumerate(statistics.kept_mass.tolist(), start=1))]
    series = [
        Series("best k of each input", best, "line", 1),
        Series("one set of k for all inputs", overall, "line", 2),
        Series("uniform router", [(0, 0), (n, 1)], "dashes"),
    ]
    mark = None if plan is None else (float(plan.k), f"k = {plan.k}")
    return Plot("mass of k experts", Axis("k", low=0, high=n), Axis("mass", "%", 0, 1), series, mark)


def _masses_in_words(statistics: LayerStatistics) -> str:
    n, masses = statistics.num_experts, statistics.mean_mass.tolist()
    first, last = _by_mass(statistics)[0], _by_mass(statistics)[-1]
    counts = sorted({max(1, n // part) for part in (16, 8, 4, 2)})
    best = ", ".join(f"{k} hold {percent(float(statistics.kept_mass[k - 1]))}" for k in counts)
    return (
        f"Mean masses of {n} experts, from {percent(masses[first], 2)} (expert {first}) to"
        f" {percent(masses[last], 2)} (expert {last}); uniform would be {percent(1 / n, 2)}. Of an input's"
        f" best experts {best} of its mass."
    )


def _by_class(statistics: LayerStatistics) -> dict[int, list[float]]:
    """The mean mass of each expert over the inputs of a class, for classes with inputs."""
    return {index: row for index, row in enumerate(statistics.class_mass.tolist()) if any(row)}


def _class_map(
    statistics: LayerStatistics, by_class: Mapping[int, list[float]], kept: Collection[int]
) -> Figure:
    order, masses = _by_mass(statistics), statistics.mean_mass.tolist()
    fair = 1 / len(masses)
    order.sort(
        key=lambda expert: math.inf if masses[expert] < SMALL * fair else _largest(by_class, expert)[0]
    )
    marked = [place for place, expert in enumerate(order) if expert in kept]
    values = [[row[expert] for expert in order] for row in by_class.values()]
    panel = HeatMap(
        "mass of each expert over the inputs of each class",
        f"{len(masses)} experts, by the class of their largest mass; those of little mass stand at the end",
        "class",
        values,
        [str(index) for index in by_class],
        marked,
        "kept",
    )
    (index, expert), most = max(
        (((index, expert), mass) for index, row in by_class.items() for expert, mass in enumerate(row)),
        key=lambda cell: cell[1],
    )
    description = (
        f"Heat map of {len(by_class)} classes and {len(masses)} experts. The largest mass is that of expert"
        f" {expert} in class {index}, {percent(most)}. The table below has the class of each expert's largest"
        " mass."
    )
    return Figure([panel], description, "Colour by the square root of the mass.")


def _largest(by_class: Mapping[int, list[float]], expert: int) -> tuple[int, float]:
    """The class over whose inputs an expert has the most mass, and that mass."""
    index = max(by_class, key=lambda index: (by_class[index][expert], -index))
    return index, by_class[index][expert]


def _experts(
    statistics: LayerStatistics,
    by_class: Mapping[int, list[float]],
    kept: Collection[int],
    plan: LayerPlan | None,
) -> Table:
    masses, most = statistics.mean_mass.tolist(), statistics.max_mass.tolist()
    has_kept = plan is not None and plan.kept is not None
    columns = ["expert", "mean mass", "largest mass\nof an input"]
    columns += ["class of the\nlargest mass", "mass over its\ninputs"] if by_class else []
    rows = []
    for expert in _by_mass(statistics):
        row = [str(expert), percent(masses[expert], 2), percent(most[expert])]
        if by_class:
            index, mass = _largest(by_class, expert)
            row += [str(index), percent(mass, 2)]
        rows.append([*row, *(["kept" if expert in kept else ""] if has_kept else [])])
    return Table((*columns, *([""] if has_kept else [])), rows, "experts in numbers", shown=0)


def _rests_on(found: Mapping[str, Any], background: Background) -> Iterator[Block]:
    """Checkpoints, data, plans and environment."""
    yield Heading("What this rests on")
    data, analysed = found["data"], background.analysis
    facts = [("checkpoint", plain(found["checkpoint"]))]
    if found.get("baseline") is not None:
        facts.append(("full model", plain(found["baseline"])))
    facts.append(("data", f"{plain(data['spec'])}, {data['samples']} samples"))
    facts.append(("data, SHA-256", plain(data["fingerprint"])))
    if analysed is not None:
        made_from = analysed.provenance["data"]
        facts.append(("analysis", f"of {plain(made_from['spec'])}, {made_from['samples']} samples"))
        facts.append(("analysis, SHA-256 of its data", plain(made_from["fingerprint"])))
        facts.append(("analysis, fingerprint of its model", analysed.provenance["checkpoint"]["fingerprint"]))
    for name, plan in plan_to_json(background.plan).items():
        kept = f": {plain(plan['kept'])}" if plan["kept"] is not None else ""
        facts.append((f"plan of {name}", plan_in_words(plan) + kept))
    facts += [(f"provenance: {name}", plain(value)) for name, value in background.provenance.items()]
    facts += [(name.replace("_", " "), plain(value)) for name, value in background.environment.items()]
    yield Facts(facts)
