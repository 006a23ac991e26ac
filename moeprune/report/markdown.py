"""A document as GitHub-flavoured Markdown, which GitLab and others read too."""

import re
from collections.abc import Iterable, Sequence

from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table, Verdict

SPECIAL = re.compile(r"[\\`*\[\]<>#~|$]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|:(?=[\w+-]+:)")
"""Characters with a meaning within a line."""
START = re.compile(r"^(\d+(?=[.)])|(?=[-+=]))")  # the start of a line that would begin a list
MARKS = {True: "✅", False: "❌"}


def to_markdown(document: Document) -> str:
    """Return a document as Markdown; gates come first.

    >>> print(to_markdown(Document("a_b.npz", [Facts([("a|b", "`c|d`")])])), end="")
    ## a_b.npz
    <BLANKLINE>
    |  |  |
    | :-- | :-- |
    | a\\|b | `c\\|d` |
    """
    title, blocks = document.title, list(document.blocks)
    if document.gates:
        passed = all(gate.passed for gate in document.gates)
        title = f"{MARKS[passed]} {'passed' if passed else 'FAILED'}: {title}"
        blocks.insert(0, document.gate_table())
    parts = [f"## {_inline(title)}", *(_block(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Lines):
        return "\n\n".join(START.sub(r"\1\\", _inline(line)) for line in block.lines)
    if isinstance(block, Facts):
        return _table(("", ""), block.rows, (":--", ":--"))
    assert isinstance(block, Table)
    alignments = (":--", *["--:"] * (len(block.columns) - 1))
    table = _table(block.columns, [row for row in block.rows if row is not None], alignments)
    return table if block.title is None else f"### {_inline(block.title)}\n\n{table}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], alignments: Sequence[str]) -> str:
    first, *others = (map(_cell, row) for row in (columns, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (first, alignments, *others))


def _cell(cell: Cell) -> str:
    if isinstance(cell, Verdict):
        return f"{MARKS[cell.passed]} {_cell(cell.text)}"
    text = cell if isinstance(cell, str) else cell.text
    indent = "&emsp;" if text.startswith("  ") else ""
    text = " ".join(text.split())
    return indent + re.sub(r"(?<!\\)\|", r"\\|", _inline(text))


def _inline(text: str) -> str:
    """Escape a text within a line, but for names in backticks, which become code."""
    pieces = re.split(r"(`[^`\n]+`)", " ".join(text.split()))
    return "".join(p if i % 2 else SPECIAL.sub(r"\\\g<0>", p) for i, p in enumerate(pieces))
