"""Results of gates in a table and in words."""

from __future__ import annotations

from collections.abc import Sequence

from moeprune.evaluation.results import GateResult
from moeprune.report.document import Cell, Table, Verdict


def gate_table(results: Sequence[GateResult]) -> Table:
    """Return a row for each gate."""
    level = next((gate.confidence for gate in results if gate.confidence is not None), None)
    rows: list[Sequence[Cell]] = []
    for gate in results:
        name = gate.name + (" (lowest of all batch sizes)" if gate.name == "min_speedup" else "")
        bound = "exact" if gate.bound is None else f"{gate.bound:.4g}"
        undecided = gate.reason == "undecided"
        word = f"FAILED: {_undecided(gate)}" if undecided else "passed" if gate.passed else "FAILED"
        bounds = [] if level is None else [bound]
        rows.append([name, f"{gate.limit:g}", f"{gate.value:.4g}", *bounds, Verdict(gate.passed, word, undecided)])
    heading = [] if level is None else [f"bound at {100 * level:g} %"]
    return Table(["gate", "limit", "value", *heading, ""], rows)


def gate_in_words(gate: GateResult) -> str:
    """Return the value of a gate, its limit and their distance."""
    limit, bound = gate.limit, gate.bound
    words = f"{gate.name} is {gate.value:.4g}, {_distance(gate.value, limit)} the limit of {limit:g}"
    if bound is not None and gate.confidence is not None:
        level = f"{100 * gate.confidence:g} %"
        words += f"; its bound at {level} is {bound:.4g}, {_distance(bound, limit)} the limit"
    return f"{words}: {_undecided(gate)}" if gate.reason == "undecided" else words


def _distance(value: float, limit: float) -> str:
    return "at" if value == limit else f"{abs(value - limit):.4g} {'above' if value > limit else 'below'}"


def _undecided(gate: GateResult) -> str:
    unit = "repetitions" if gate.name == "min_speedup" else "samples"
    if gate.samples_needed is None:
        return f"{gate.samples:,} {unit} cannot show it, nor would more like them"
    step = 10 ** max(0, len(str(gate.samples_needed)) - 2)  # rounded up to two digits
    return f"{gate.samples:,} {unit} cannot show it, about {-(-gate.samples_needed // step) * step:,} would"
