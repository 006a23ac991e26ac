"""A document as workflow commands of GitHub Actions, which become annotations of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from moeprune.evaluation.results import GateResult
from moeprune.report.document import Document, Facts, Lines, Table
from moeprune.report.gates import gate_in_words


def to_annotations(command: str, document: Document, gates: Sequence[GateResult], warnings: Iterable[str]) -> str:
    """Return an error for each failed gate, a warning for each warning, and a notice for the rest."""
    lines = [annotation("warning", command, warning) for warning in warnings]
    for gate in sorted(gates, key=lambda gate: gate.passed):
        level, verdict = ("notice", "passed") if gate.passed else ("error", "failed")
        title = f"{command}: {gate.name} {verdict}"
        lines.append(annotation(level, title, f"{document.title}: {gate_in_words(gate)}"))
    if not gates:
        lines.append(annotation("notice", command, "\n".join(_summary(document))))
    return "\n".join(lines) + "\n"


def annotation(level: str, title: str, message: str) -> str:
    """Return one workflow command; level: `error`, `warning` or `notice`.

    >>> annotation("error", "a, b: c", "50 %")
    '::error title=a%2C b%3A c::50 %25'
    """
    escaped = _escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _summary(document: Document) -> Iterator[str]:
    """Return title, facts and lines: an annotation has no room for tables of more than two columns."""
    yield document.title
    for block in document.blocks:
        if isinstance(block, Lines):
            yield from block.lines
        elif isinstance(block, Facts) or (isinstance(block, Table) and len(block.columns) == 2):
            yield from (f"{row[0]}: {row[1]}" for row in block.rows if row is not None)
