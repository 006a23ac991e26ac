"""What a report consists of, whatever form it is shown in: a title, what gates say, tables and lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether a gate passed, and how that is said."""

    passed: bool
    text: str


Cell = str | Verdict


@dataclass(frozen=True)
class Table:
    """Columns by their headings, which may have several lines, and rows of cells.

    title: what it shows, where that is not said above. A row of None separates those before from those after.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell] | None]
    title: str | None = None


@dataclass(frozen=True)
class Facts:
    """Texts by their labels, in order; a label may come twice."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Lines:
    """Sentences, a line for each; names stand in backticks."""

    lines: Sequence[str]


Block = Table | Facts | Lines


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
