"""A report as one page of HTML that needs nothing beside it: no script, no request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.report import draw
from moeprune.report.document import (
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
from moeprune.report.figure import Figure
from moeprune.report.markup import escape

SUFFIXES = (".html", ".htm")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def check_page(path: Path) -> None:
    """Refuse a path of a page by its name, before any work is done for it.

    Raises:
        MoepruneError: another suffix than SUFFIXES.
    """
    if path.suffix not in SUFFIXES:
        raise MoepruneError(
            f"`{path}` is no page of HTML", f"give a path that ends with {' or '.join(SUFFIXES)}"
        )


def to_html(document: Document) -> str:
    """The report as a page, which is XML too; what gates say stands first.

    >>> page = to_html(Document("<script>", [Lines(["give `--keep 1/8`"])]))
    >>> "<script" in page, "give <code>--keep 1/8</code>" in page
    (False, True)
    """
    style = (resources.files("moeprune.report") / "page.css").read_text(encoding="utf-8")
    title = escape(document.title)
    blocks = "\n".join(_block(block) for block in document.blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>\n'
        f"<style>\n{style}</style>\n</head>\n"
        f"<body>\n<header>{_badge(document.gates)}<h1>{title}</h1></header>\n<main>\n"
        f"{'' if document.gates is None else _table(document.gates)}{blocks}\n</main>\n</body>\n</html>\n"
    )


def _badge(gates: Table | None) -> str:
    """In a word what the gates say, and how many say so."""
    if gates is None:
        return ""
    verdicts = [cell for row in gates.rows if row is not None for cell in row if isinstance(cell, Verdict)]
    passed = sum(verdict.passed for verdict in verdicts)
    undecided = sum(verdict.undecided for verdict in verdicts)
    failed = len(verdicts) - passed - undecided
    word, kind = ("FAILED", "bad") if failed else ("UNDECIDED", "open") if undecided else ("passed", "good")
    counts = [
        f"{count} {'gate' if count == 1 else 'gates'} {what}"
        for count, what in ((passed, "passed"), (failed, "failed"), (undecided, "undecided"))
        if count
    ]
    return f'<span class="badge {kind}">{word}</span><span class="counts">{", ".join(counts)}</span>'


def _block(block: Block) -> str:
    if isinstance(block, Lines):
        return "\n".join(f"<p>{_inline(line)}</p>" for line in block.lines)
    if isinstance(block, Facts):
        rows = "".join(
            f'<tr><th scope="row">{_inline(name)}</th><td>{_inline(text)}</td></tr>'
            for name, text in block.rows
        )
        return f'<table class="facts"><tbody>{rows}</tbody></table>'
    if isinstance(block, Heading):
        return f"<h2>{_inline(block.text)}</h2>"
    if isinstance(block, Highlights):
        return f'<dl class="highlights">{"".join(_highlight(*row) for row in block.rows)}</dl>'
    return draw.figure(block) if isinstance(block, Figure) else _table(block)


def _highlight(label: str, value: str, note: str) -> str:
    value, note = (
        _inline(text).replace(" %", "\u00a0%").replace(" pt", "\u00a0pt") for text in (value, note)
    )
    return f'<div><dt>{_inline(label)}</dt><dd class="value">{value}</dd><dd>{note}</dd></div>'


def _table(table: Table) -> str:
    """A table, or the rows that are shown and the rest of them, folded."""
    title = "" if table.title is None else f"<h3>{_inline(table.title)}</h3>"
    if table.shown is None or table.shown >= len(table.rows):
        return title + _rows(table.columns, table.rows)
    shown = _rows(table.columns, table.rows[: table.shown]) if table.shown else ""
    rest = _rows(table.columns, table.rows[table.shown :])
    folded = f"{len(table.rows) - table.shown} {'more rows' if shown else 'rows'}"
    if not shown:
        return f"<details><summary>{_inline(table.title or '')} ({folded})</summary>{rest}</details>"
    return f"{title}{shown}<details><summary>{folded}</summary>{rest}</details>"


def _rows(columns: Sequence[str], rows: Iterable[Sequence[Cell] | None]) -> str:
    heading = "".join(f'<th scope="col">{_lines(column)}</th>' for column in columns)
    body = "".join("</tbody><tbody>" if row is None else f"<tr>{_cells(row)}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heading}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(row: Sequence[Cell]) -> str:
    first, *others = row
    name = first if isinstance(first, str) else first.text
    kind = ' class="part"' if name.startswith("  ") else ""
    return f'<th scope="row"{kind}>{_inline(name.strip())}</th>' + "".join(
        f"<td>{_cell(cell)}</td>" for cell in others
    )


def _cell(cell: Cell) -> str:
    if isinstance(cell, Verdict):
        kind, mark = ("good", "✓") if cell.passed else ("open", "?") if cell.undecided else ("bad", "✗")
        return f'<span class="{kind}">{mark} {_inline(cell.text)}</span>'
    if isinstance(cell, Interval):
        return f"{_inline(cell.text)} {draw.interval(cell)}"
    return _inline(cell)


def _lines(text: str) -> str:
    return "<br/>".join(_inline(line) for line in text.split("\n"))


def _inline(text: str) -> str:
    """A text within a line: names in backticks become code."""
    pieces = re.split(r"`([^`\n]+)`", text)
    return "".join(
        f"<code>{escape(piece)}</code>" if index % 2 else escape(piece) for index, piece in enumerate(pieces)
    )
