"""A report as Markdown, in GitHub's flavour, which GitLab and others read too."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from moeprune.report.document import (
    Block,
    Cell,
    Document,
    Facts,
    Heading,
    Highlights,
    Interval,
    Lines,
    Verdict,
)
from moeprune.report.figure import Figure

SPECIAL = re.compile(r"[\\`*\[\]<>#~|$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|:(?=[\w+-]+:)")
"""What means something within a line."""


def to_markdown(document: Document) -> str:
    """The report as Markdown; what gates say stands first.

    >>> print(to_markdown(Document("a_b.npz", [Facts([("a|b", "`c|d`")])])), end="")
    ## a_b.npz
    <BLANKLINE>
    |  |  |
    | :-- | :-- |
    | a\\|b | `c\\|d` |
    """
    title, blocks = document.title, list(document.blocks)
    if document.gates is not None:
        title = f"{_mark(document.passed)} {'passed' if document.passed else 'FAILED'}: {title}"
        blocks.insert(0, document.gates)
    parts = [f"## {_inline(title)}", *(_block(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Lines):
        return "\n\n".join(_start(_inline(line)) for line in block.lines)
    if isinstance(block, Facts):
        return _table(("", ""), block.rows, (":--", ":--"))
    if isinstance(block, Highlights):
        return _table(("", "", ""), block.rows, (":--", "--:", ":--"))
    if isinstance(block, Heading):
        return f"### {_inline(block.text)}"
    if isinstance(block, Figure):
        return _start(_inline(block.description))
    alignments = (":--", *["--:"] * (len(block.columns) - 1))
    table = _table(block.columns, [row for row in block.rows if row is not None], alignments)
    return table if block.title is None else f"### {_inline(block.title)}\n\n{table}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], alignments: Sequence[str]) -> str:
    lines = [_row(columns), f"| {' | '.join(alignments)} |", *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: Iterable[Cell]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(cell: Cell) -> str:
    if isinstance(cell, Verdict):
        return f"{_mark(cell.passed)} {_cell(cell.text)}"
    if isinstance(cell, Interval):
        return _cell(cell.text)
    text = " ".join(cell.split())
    indent = "&emsp;" if cell.startswith("  ") else ""
    return indent + re.sub(r"(?<!\\)\|", r"\\|", _inline(text))


def _mark(passed: bool) -> str:
    return "✅" if passed else "❌"


def _inline(text: str) -> str:
    """A text within a line: names in backticks become code, everything else stands for itself."""
    pieces = re.split(r"(`[^`\n]+`)", " ".join(text.split()))
    return "".join(
        piece if index % 2 else SPECIAL.sub(r"\\\g<0>", piece) for index, piece in enumerate(pieces)
    )


def _start(line: str) -> str:
    """A line that starts no list and no other block."""
    return re.sub(r"^(\d+(?=[.)])|(?=[-+=]))", r"\1\\", line)
