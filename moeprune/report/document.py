"""The intermediate form of all reports: a title, blocks and results of gates, however they are shown."""

from __future__ import annotations

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


Block = Table | Facts | Lines | Heading | Highlights | Figure
"""The last three are on pages only."""


class Document(NamedTuple):
    """The report of one command."""

    title: str
    blocks: Sequence[Block]
    gates: Sequence[GateResult] = ()
