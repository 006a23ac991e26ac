"""The intermediate form of all reports: a title, blocks and results of gates, however they are shown."""

from collections.abc import Sequence
from typing import NamedTuple

from moeprune.evaluation.results import GateResult


class Verdict(NamedTuple):
    """The verdict on a gate; undecided: it failed only for want of samples."""

    passed: bool
    text: str
    undecided: bool = False


class Interval(NamedTuple):
    """A value and its interval, drawn on a page; all lie within ±reach, which a whole column shares."""

    text: str
    low: float
    value: float
    high: float
    reach: float


Cell = str | Verdict | Interval


class Table(NamedTuple):
    """Rows of cells under headings, which may have several lines; a row of None separates groups."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell] | None]
    title: str | None = None
    shown: int | None = None  # rows that a page does not fold away; None: all


class Facts(NamedTuple):
    """Texts by their labels, in order; a label may occur twice."""

    rows: Sequence[tuple[str, str]]


class Lines(NamedTuple):
    """Sentences, one per line; names stand in backticks."""

    lines: Sequence[str]


class Heading(NamedTuple):
    """The heading of the blocks below it."""

    text: str


class Highlights(NamedTuple):
    """The most important figures: labels, values, and a note on each."""

    rows: Sequence[tuple[str, str, str]]


class Figure(NamedTuple):
    """Panels of SVG side by side; description: for readers who cannot see them."""

    panels: Sequence[str]
    description: str
    caption: str = ""


Block = Table | Facts | Lines | Heading | Highlights | Figure  # the last three are on pages only


class Document(NamedTuple):
    """The report of one command."""

    title: str
    blocks: Sequence[Block]
    gates: Sequence[GateResult] = ()

    def gate_table(self, with_reasons: bool = True) -> Table:
        """Return a row for each gate; with_reasons: say what an undecided one would need."""
        level = next((gate.confidence for gate in self.gates if gate.confidence is not None), None)
        rows: list[Sequence[Cell]] = []
        for gate in self.gates:
            name = gate.name + (" (lowest of all batch sizes)" if gate.name == "min_speedup" else "")
            bound = "exact" if gate.bound is None else f"{gate.bound:.4g}"
            undecided = gate.reason == "undecided"
            word = (
                "passed" if gate.passed else f"FAILED: {_undecided(gate)}" if undecided and with_reasons else "FAILED"
            )
            bounds = [] if level is None else [bound]
            rows.append([name, f"{gate.limit:g}", f"{gate.value:.4g}", *bounds, Verdict(gate.passed, word, undecided)])
        heading = [] if level is None else [f"bound at {100 * level:g} %"]
        return Table(["gate", "limit", "value", *heading, ""], rows)

    @property
    def undecided(self) -> Lines:
        """A line for each gate that the samples cannot decide."""
        gates = [gate for gate in self.gates if gate.reason == "undecided"]
        return Lines([f"{gate.name} FAILED: {_undecided(gate)}" for gate in gates])


def with_warnings(document: Document, warnings: Sequence[str]) -> Document:
    """Return a document that begins with the warnings of its command."""
    lines = [Lines([f"warning: {warning}" for warning in warnings])] if warnings else []
    return document._replace(blocks=[*lines, *document.blocks])


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
