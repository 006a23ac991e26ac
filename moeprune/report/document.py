"""What a report consists of, whatever form it is shown in: a title, what gates say, tables, text, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.report.figure import Figure


@dataclass(frozen=True)
class Verdict:
    """Whether a gate passed, and how that is said; undecided: it failed for want of samples alone."""

    passed: bool
    text: str
    undecided: bool = False


@dataclass(frozen=True)
class Interval:
    """A value and its interval, all of them within ±reach, which is one for a whole column."""

    text: str
    low: float
    value: float
    high: float
    reach: float


Cell = str | Verdict | Interval


@dataclass(frozen=True)
class Table:
    """Columns by their headings, which may have several lines, and rows of cells.

    title: what it shows, where that is not said above. A row of None separates those before from those after.
    shown: the rest of the rows may be folded away; None: there is no rest.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell] | None]
    title: str | None = None
    shown: int | None = None


@dataclass(frozen=True)
class Facts:
    """Texts by their labels, in order; a label may come twice."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Lines:
    """Sentences, a line for each; names stand in backticks."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """What the blocks up to the next one are about."""

    text: str


@dataclass(frozen=True)
class Highlights:
    """What a reader wants to know first: labels, values, and a note on each."""

    rows: Sequence[tuple[str, str, str]]


Block = Table | Facts | Lines | Heading | Highlights | Figure


@dataclass(frozen=True)
class Document:
    """A report of one command.

    title: what it is about. blocks: what was found. gates: a table of limits and verdicts, None where there
    are no gates; passed: whether all of them passed.
    """

    title: str
    blocks: Sequence[Block]
    gates: Table | None = None
    passed: bool = True
