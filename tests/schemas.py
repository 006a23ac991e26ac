"""The published JSON Schemas, read by a library that knows nothing of moeprune."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FILES = {
    path.name.removesuffix(".json"): json.loads(path.read_text(encoding="utf-8"))
    for path in (resources.files("moeprune") / "schemas").iterdir()
}


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of `eval`, `sweep`, and so on."""
    registry = Registry().with_resources(
        (f"{file}.json", Resource.from_contents(schema)) for file, schema in FILES.items()
    )
    return Draft202012Validator(FILES[name], registry=registry)


def schema_of(words: Iterable[str], found: dict[str, Any]) -> str:
    """The schema of what a command line reports."""
    command = next(word for word in words if word in FILES)
    return "sweep" if command == "eval" and "rows" in found else command


def complaints(name: str, found: Any) -> list[str]:
    """What a schema has to say against a value."""
    return [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(found)]
