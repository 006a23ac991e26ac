"""The intermediate form of all reports: a title, gates and blocks, however they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The verdict on a gate; undecided: it failed only for want of samples."""

    passed: bool
    text: str
    undecided: bool = False


@dataclass(frozen=True)
class Interval:
    """A value and its interval, drawn on a page; all lie within ±reach, which a whole column shares."""

    text: str
    low: float
    value: float
    high: float
    reach: float


Cell = str | Verdict | Interval


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings, which may have several lines; a row of None separates groups."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell] | None]
    title: str | None = None
    shown: int | None = None  # rows that a page does not fold away; None: all


@dataclass(frozen=True)
class Facts:
    """Texts by their labels, in order; a label may occur twice."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Lines:
    """Sentences, one per line; names stand in backticks."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """The heading of the blocks below it."""

    text: str


@dataclass(frozen=True)
class Highlights:
    """The most important figures: labels, values, and a note on each."""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Figure:
    """Panels of SVG side by side; description: for readers who cannot see them."""

    panels: Sequence[str]
    description: str
    caption: str = ""


Block = Table | Facts | Lines | Heading | Highlights | Figure
"""The last three are on pages only."""


@dataclass(frozen=True)
class Document:
    """The report of one command; gates: None if nothing was judged."""

    title: str
    blocks: Sequence[Block]
    gates: Table | None = None

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on all gates."""
        rows = () if self.gates is None else self.gates.rows
        return [cell for row in rows if row is not None for cell in row if isinstance(cell, Verdict)]
