"""A page as one file of HTML without scripts and requests (the extra `report`)."""

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from moeprune.evaluation.results import GateResult
from moeprune.report.document import Document
from moeprune.report.words import legal, plural


def to_html(page: Document) -> str:
    """Return a page as HTML, which is XML too; gates come first.

    >>> from moeprune.report.document import Lines
    >>> html = to_html(Document("<script>", [Lines(["give `--keep 1/8`"])]))
    >>> "<script" in html, "give <code>--keep 1/8</code>" in html
    (False, True)
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=True,
        undefined=StrictUndefined, finalize=lambda value: legal(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters["inline"] = _inline
    blocks = [(type(block).__name__, block) for block in page.blocks]
    table, badge = (page.gate_table(), _badge(page.gates)) if page.gates else (None, None)
    return environment.get_template("page.html").render(page=page, gates=table, blocks=blocks, badge=badge) + "\n"


def _inline(text: str) -> Markup:
    """Return a text of one line or several, with names in backticks as code."""
    marked = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(legal(text))))
    return Markup(marked.replace("\n", "<br/>"))


def _badge(gates: Sequence[GateResult]) -> tuple[str, str, str]:
    """Return the class, the word and the counts of a summary of all gates."""
    passed, undecided = sum(gate.passed for gate in gates), sum(gate.reason == "undecided" for gate in gates)
    failed = len(gates) - passed - undecided
    kind, word = ("bad", "FAILED") if failed else ("open", "UNDECIDED") if undecided else ("good", "passed")
    counts = ((passed, "passed"), (failed, "failed"), (undecided, "undecided"))
    return kind, word, ", ".join(f"{plural(count, 'gate')} {what}" for count, what in counts if count)
