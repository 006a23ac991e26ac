"""A document as JUnit XML, the format of test results that CI servers read."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from moeprune.errors import MoepruneError
from moeprune.evaluation.results import GateResult
from moeprune.report.document import Document
from moeprune.report.gates import gate_in_words
from moeprune.report.text import to_text
from moeprune.report.words import legal


def to_junit(command: str, document: Document, gates: Sequence[GateResult], warnings: Sequence[str]) -> str:
    """Return a test case for each gate, or one for the command if nothing was judged; without times.

    Args:
        command: such as `moeprune eval`.
        document: its report, for `system-out`.
        gates: their results.
        warnings: those given during the run, for `system-err`.
    """
    suites, suite = _suite(command, len(gates) or 1, failures=sum(not gate.passed for gate in gates))
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": command, "name": gate.name})
        if not gate.passed:
            words = gate_in_words(gate)
            failure = ElementTree.SubElement(case, "failure", {"type": "gate", "message": words})
            failure.text = legal(f"{document.title}: {words}")
    if not gates:
        ElementTree.SubElement(suite, "testcase", {"classname": "moeprune", "name": command})
    ElementTree.SubElement(suite, "system-out").text = legal(to_text(document))
    if warnings:
        ElementTree.SubElement(suite, "system-err").text = legal("\n".join(warnings) + "\n")
    return _document(suites)


def error_to_junit(command: str, error: MoepruneError) -> str:
    """Return one test case with an error.

    Args:
        command: such as `moeprune eval`.
        error: why it failed.
    """
    suites, suite = _suite(command, 1, errors=1)
    case = ElementTree.SubElement(suite, "testcase", {"classname": "moeprune", "name": command})
    element = ElementTree.SubElement(case, "error", {"type": "error", "message": legal(error.message)})
    element.text = legal(str(error))
    return _document(suites)


def _suite(
    command: str, tests: int, failures: int = 0, errors: int = 0
) -> tuple[ElementTree.Element, ElementTree.Element]:
    """Return the root and its test suite."""
    counts = {"tests": str(tests), "failures": str(failures), "errors": str(errors)}
    suites = ElementTree.Element("testsuites", {"name": "moeprune", **counts})
    return suites, ElementTree.SubElement(suites, "testsuite", {"name": command, **counts, "skipped": "0"})


def _document(suites: ElementTree.Element) -> str:
    ElementTree.indent(suites)
    return f"<?xml version='1.0' encoding='UTF-8'?>\n{ElementTree.tostring(suites, encoding='unicode')}\n"
