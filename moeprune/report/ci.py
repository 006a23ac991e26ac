"""A document for CI servers: annotations of GitHub Actions, and JUnit XML."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from moeprune.errors import MoepruneError
from moeprune.report.document import Document, Facts, Lines, Table, gate_in_words
from moeprune.report.text import to_text
from moeprune.report.words import legal


def to_annotations(command: str, document: Document, warnings: Sequence[str]) -> str:
    """Return an error for each failed gate, a warning for each warning, and a notice for the rest."""
    lines = [annotation("warning", command, warning) for warning in warnings]
    for gate in sorted(document.gates, key=lambda gate: gate.passed):
        level, verdict = ("notice", "passed") if gate.passed else ("error", "failed")
        title = f"{command}: {gate.name} {verdict}"
        lines.append(annotation(level, title, f"{document.title}: {gate_in_words(gate)}"))
    if not document.gates:
        lines.append(annotation("notice", command, "\n".join(_summary(document))))
    return "\n".join(lines) + "\n"


def annotation(level: str, title: str, message: str) -> str:
    """Return one workflow command; level: `error`, `warning` or `notice`.

    >>> annotation("error", "a, b: c", "50 %")
    '::error title=a%2C b%3A c::50 %25'
    """
    title, message = (text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A") for text in (title, message))
    return f"::{level} title={title.replace(':', '%3A').replace(',', '%2C')}::{message}"


def _summary(document: Document) -> Iterator[str]:
    """Return title, facts and lines: an annotation has no room for tables of more than two columns."""
    yield document.title
    for block in document.blocks:
        if isinstance(block, Lines):
            yield from block.lines
        elif isinstance(block, Facts) or (isinstance(block, Table) and len(block.columns) == 2):
            yield from (f"{row[0]}: {row[1]}" for row in block.rows if row is not None)


def to_junit(command: str, document: Document, warnings: Sequence[str]) -> str:
    """Return a test case for each gate, or one for the command if nothing was judged; without times.

    The document becomes `system-out`, the warnings `system-err`.
    """
    suite = Element("testsuite")
    for gate in document.gates:
        words, case = gate_in_words(gate), _add(suite, "testcase", classname=command, name=gate.name)
        if not gate.passed:
            _add(case, "failure", f"{document.title}: {words}", type="gate", message=words)
    if not document.gates:
        _add(suite, "testcase", classname="moeprune", name=command)
    _add(suite, "system-out", to_text(document))
    if warnings:
        _add(suite, "system-err", "\n".join(warnings) + "\n")
    return _to_xml(command, suite)


def error_to_junit(command: str, error: MoepruneError) -> str:
    """Return one test case with an error."""
    suite = Element("testsuite")
    case = _add(suite, "testcase", classname="moeprune", name=command)
    _add(case, "error", str(error), type="error", message=error.message)
    return _to_xml(command, suite)


def _add(parent: Element, tag: str, text: str = "", **attributes: str) -> Element:
    added = SubElement(parent, tag, {name: legal(value) for name, value in attributes.items()})
    added.text = legal(text)
    return added


def _to_xml(command: str, suite: Element) -> str:
    paths = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error"}
    counts = {name: str(len(suite.findall(path))) for name, path in paths.items()}
    suite.attrib = {"name": command, **counts, "skipped": "0"}
    suites = Element("testsuites", {"name": "moeprune", **counts})
    suites.append(suite)
    indent(suites)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{tostring(suites, encoding='unicode')}\n"
