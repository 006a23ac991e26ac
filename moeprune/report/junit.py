"""A document as JUnit XML, the format of test results that CI servers read."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from moeprune.errors import MoepruneError
from moeprune.evaluation.results import GateResult
from moeprune.report.document import Document
from moeprune.report.gates import gate_in_words
from moeprune.report.text import to_text
from moeprune.report.words import legal


def to_junit(command: str, document: Document, gates: Sequence[GateResult], warnings: Sequence[str]) -> str:
    """Return a test case for each gate, or one for the command if nothing was judged; without times.

    The document becomes `system-out`, the warnings `system-err`.
    """
    suite = Element("testsuite")
    for gate in gates:
        words = gate_in_words(gate)
        failure = () if gate.passed else ("failure", "gate", words, f"{document.title}: {words}")
        _add_case(suite, command, gate.name, *failure)
    if not gates:
        _add_case(suite, "moeprune", command)
    SubElement(suite, "system-out").text = legal(to_text(document))
    if warnings:
        SubElement(suite, "system-err").text = legal("\n".join(warnings) + "\n")
    return _to_xml(command, suite)


def error_to_junit(command: str, error: MoepruneError) -> str:
    """Return one test case with an error."""
    suite = Element("testsuite")
    _add_case(suite, "moeprune", command, "error", "error", error.message, str(error))
    return _to_xml(command, suite)


def _add_case(suite: Element, classname: str, name: str, outcome: str = "", *parts: str) -> None:
    """Add a test case; outcome: `failure` or `error`, with its type, message and text."""
    case = SubElement(suite, "testcase", {"classname": classname, "name": name})
    if outcome:
        kind, message, text = map(legal, parts)
        SubElement(case, outcome, {"type": kind, "message": message}).text = text


def _to_xml(command: str, suite: Element) -> str:
    paths = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error"}
    counts = {name: str(len(suite.findall(path))) for name, path in paths.items()}
    suite.attrib = {"name": command, **counts, "skipped": "0"}
    suites = Element("testsuites", {"name": "moeprune", **counts})
    suites.append(suite)
    indent(suites)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{tostring(suites, encoding='unicode')}\n"
