"""Typed records: what is read from JSON is checked strictly, what is written has a JSON Schema; no torch."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, TypeVar, get_type_hints

import msgspec

from moeprune.errors import MoepruneError

T = TypeVar("T")


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Frozen fields of the annotated types, checked however the record is made.

    A field that has its default is left out of the JSON, so that files and fingerprints of today stay as they
    are when a field is added.

    Raises:
        MoepruneError: a value does not fit the type of its field.
    """

    def __post_init__(self) -> None:
        for name, kind in _field_types(type(self)).items():
            from_json(getattr(self, name), kind, f"`{name}`")


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of what a command reports: computed here, not read. All fields are in the JSON, None as null."""


class Report(Result, frozen=True, tag_field="schema_version", tag=1):
    """What one command reports; its JSON begins with `schema_version`."""


@functools.cache
def _field_types(record: type) -> dict[str, Any]:
    hints = get_type_hints(record, include_extras=True)
    return {name: hints[name] for name in record.__struct_fields__}  # type: ignore[attr-defined]


def to_json(value: Any) -> Any:
    """Return a record, or a container of records, as JSON values."""
    return msgspec.to_builtins(value)


def from_json(value: Any, kind: type[T] | Any, where: str) -> T:
    """Read a value of a type from JSON values.

    Args:
        value: JSON values, or records within them.
        kind: the type, such as a Record.
        where: what the value is called in errors.

    Raises:
        MoepruneError: an unknown or missing key, or a value of another type; it says what was found.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`")
        place = f"{where}{': `' + path.lstrip('.') + '`' if path else ''}"
        raise MoepruneError(f"{place}: {reason[:1].lower()}{reason[1:]}{_found(value, path)}") from None


def _found(value: Any, path: str) -> str:
    """What stands at a path of msgspec's, in words, if it can be told."""
    for key, index in re.findall(r"\.([\w-]+)|\[(\d+)\]", path):
        if key:
            value = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        else:
            value = value[int(index)] if isinstance(value, list | tuple) and int(index) < len(value) else None
    if isinstance(value, dict | list | tuple | msgspec.Struct) or "[...]" in path:
        return ""
    return f", found {value!r}"


def to_text(value: Any) -> str:
    """Return a record or a result as JSON text, indented, in ASCII."""
    return json.dumps(to_json(value), indent=2) + "\n"


def json_schema(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a type."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}
