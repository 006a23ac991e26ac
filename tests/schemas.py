"""The JSON Schemas of all reports, read by a library that knows nothing of moeprune."""

import functools
from collections.abc import Iterable
from typing import Any

from jsonschema import Draft202012Validator

from moeprune.report import commands


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of `eval`, `sweep`, and so on."""
    return Draft202012Validator(commands.schema_of(name))


def schema_of(words: Iterable[str], report: dict[str, Any]) -> str:
    """The schema of what a command line reports."""
    command = next((word for word in words if word in commands.TYPES), "")
    kinds = {"rows": "sweep", "sequence_length": "eval-language"}  # of what `eval` reports
    if kinds.keys() <= report.keys():
        return "sweep-language"
    return next((kind for key, kind in kinds.items() if command == "eval" and key in report), command)


def complaints(name: str, report: Any) -> list[str]:
    """What a schema has to say against a value."""
    if not name:
        return []
    return [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(report)]
