"""What a page shows of the experts of a layer: their masses, over all inputs and over those of each class."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from moeprune.calibration.statistics import LayerStatistics
from moeprune.plan import LayerPlan
from moeprune.report.commands import percent, plan_in_words
from moeprune.report.document import Block, Heading, Lines, Table
from moeprune.report.figure import Axis, Bars, Figure, HeatMap, Plot, Series

SMALL = 0.25
"""Share of a fair share of the mass, below which an expert stands for no class."""


def experts_of(name: str, statistics: LayerStatistics, plan: LayerPlan | None) -> Iterator[Block]:
    """Of a layer: masses, the mass of the best experts, classes, and every expert in numbers.

    Args:
        name: of the layer.
        statistics: of it, before it was pruned.
        plan: what it keeps; None: all.
    """
    yield Heading(f"Experts of `{name}`")
    if plan is not None:
        yield Lines([_in_words(statistics, plan)])
    kept = None if plan is None else plan.kept
    yield Figure(
        [_masses(statistics, kept), _curve(statistics, plan)],
        _masses_in_words(statistics),
        "Mass: an expert's share of the combine weights; the masses of one input sum to 1.",
    )
    by_class = _by_class(statistics)
    if by_class:
        yield _class_map(statistics, by_class, kept)
    yield _experts(statistics, by_class, kept)


def _in_words(statistics: LayerStatistics, plan: LayerPlan) -> str:
    text = plan_in_words(plan)
    if plan.kept is not None:
        mass = float(statistics.mean_mass[list(plan.kept)].sum())
        text += f": the kept experts hold {percent(mass)} of the mass of all inputs"
    elif plan.scope == "input" and plan.signal == "combine" and plan.mass is None and plan.k:
        mass = float(statistics.kept_mass[plan.k - 1])
        text += f": the best {plan.k} of an input hold {percent(mass)} of its mass"
    return text


def _by_mass(statistics: LayerStatistics) -> list[int]:
    """Experts, the largest mean mass first."""
    masses = statistics.mean_mass.tolist()
    return sorted(range(len(masses)), key=lambda expert: (-masses[expert], expert))


def _places(order: Sequence[int], kept: Collection[int] | None) -> list[int] | None:
    """Where the kept experts stand in an order."""
    return None if kept is None else [place for place, expert in enumerate(order) if expert in kept]


def _masses(statistics: LayerStatistics, kept: Collection[int] | None) -> Bars:
    order, masses = _by_mass(statistics), statistics.mean_mass.tolist()
    n = len(order)
    return Bars(
        "mean mass of each expert",
        Axis("experts, the largest first", low=0, high=n),
        Axis("mass", "%", low=0),
        [masses[expert] for expert in order],
        _places(order, kept),
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
    mark = None if plan is None or plan.mass is not None else (float(plan.k), f"k = {plan.k}")
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
    statistics: LayerStatistics, by_class: Mapping[int, list[float]], kept: Collection[int] | None
) -> Figure:
    order, masses = _by_mass(statistics), statistics.mean_mass.tolist()
    fair = 1 / len(masses)
    order.sort(
        key=lambda expert: math.inf if masses[expert] < SMALL * fair else _largest(by_class, expert)[0]
    )
    values = [[row[expert] for expert in order] for row in by_class.values()]
    panel = HeatMap(
        "mass of each expert over the inputs of each class",
        f"{len(masses)} experts, by the class of their largest mass; those of little mass stand at the end",
        "class",
        values,
        [str(index) for index in by_class],
        _places(order, kept) or (),
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
    kept: Collection[int] | None,
) -> Table:
    masses, most = statistics.mean_mass.tolist(), statistics.max_mass.tolist()
    columns = ["expert", "mean mass", "largest mass\nof an input"]
    columns += ["class of the\nlargest mass", "mass over its\ninputs"] if by_class else []
    rows = []
    for expert in _by_mass(statistics):
        row = [str(expert), percent(masses[expert], 2), percent(most[expert])]
        if by_class:
            index, mass = _largest(by_class, expert)
            row += [str(index), percent(mass, 2)]
        if kept is not None:
            row.append("kept" if expert in kept else "")
        rows.append(row)
    columns += [] if kept is None else [""]
    return Table(tuple(columns), rows, "experts in numbers", shown=0)
