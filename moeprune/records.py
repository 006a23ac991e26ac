"""Typed records with strict checks on reading and JSON Schemas; no torch."""

import functools
import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from moeprune.errors import MoepruneError

T = TypeVar("T")
R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Frozen fields of the annotated types, checked however the record is made.

    Fields at their defaults are left out of the JSON, so that adding a field changes no existing file or fingerprint.
    """

    def replace(self: R, **changes: Any) -> R:
        """Return the record with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)

    def __post_init__(self) -> None:
        for name, kind in _field_types(type(self)).items():
            value = getattr(self, name)
            converted = from_json(value, kind, f"`{name}`")
            if converted is not value:  # a list in place of a tuple
                msgspec.structs.force_setattr(self, name, converted)


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of what a command reports: computed here, not read. All fields are in the JSON, None as null."""


class Report(Result, frozen=True, kw_only=True, tag_field="schema_version", tag=1):
    """The report of one command; its JSON begins with `schema_version`. warnings: of the command, in order."""

    warnings: tuple[str, ...] = ()


@functools.cache
def _field_types(record: type) -> dict[str, Any]:
    hints = get_type_hints(record, include_extras=True)
    return {name: hints[name] for name in record.__struct_fields__}  # type: ignore[attr-defined]


def to_json(value: Any) -> Any:
    """Return a record, or a container of records, as JSON values."""
    return msgspec.to_builtins(value)


def pack(value: Any) -> Any:
    """Return a value of lists, tuples and dicts as JSON values in which a tuple is an object with the key `tuple`."""
    if isinstance(value, tuple):
        return {"tuple": [pack(part) for part in value]}
    if isinstance(value, list):
        return [pack(part) for part in value]
    return {key: pack(part) for key, part in value.items()} if isinstance(value, dict) else value


def unpack(value: Any) -> Any:
    """Return the value that `pack` made JSON values of."""
    if isinstance(value, dict):
        if value.keys() == {"tuple"} and isinstance(value["tuple"], list):
            return tuple(unpack(part) for part in value["tuple"])
        return {key: unpack(part) for key, part in value.items()}
    return [unpack(part) for part in value] if isinstance(value, list) else value


def from_json(value: Any, kind: type[T] | Any, where: str) -> T:
    """Read a value of a type, such as a Record, from JSON values, or records within them.

    where: name of the value in the MoepruneError about an unknown or missing key, or a value of another type.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_from_class)
    except UnicodeEncodeError:
        raise MoepruneError(f"{where}: not text in UTF-8") from None
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$")
        keys = [key or int(index) for key, index in re.findall(r"\.([\w-]+)|\[(\d+)\]", path)]
        place = " ".join(filter(None, (where, path.strip(".`") and f"`{path.strip('.`')}`")))
        found, there = "" if "[...]" in path else _found(value, keys), list(_types_at(kind, keys))
        hint: Any = "give a fraction: one percent is 0.01" if re.search("<=? 1.0$", reason) else None
        if reason.startswith("Invalid enum value"):
            choices = [choice for part in there if get_origin(part) is Literal for choice in get_args(part)]
            reason = f"expected one of {', '.join(str(choice) or repr(choice) for choice in choices)}"
        elif unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
            known = [name for part in there if _is_struct(part) for name in _field_types(part)]
            near = get_close_matches(unknown[1], known, n=1)
            reason = f"unknown key `{unknown[1]}`"
            hint = f"did you mean `{near[0]}`?" if near else known and f"known keys are {', '.join(known)}"
        message = f"{place}: {reason[:1].lower()}{reason[1:]}{found}".lstrip(": ")
        raise MoepruneError(message, hint or None) from None


def _from_class(kind: type, value: Any) -> Any:
    """Read a type that is not a record by its own class method."""
    if isinstance(value, kind):
        return value
    if issubclass(kind, Path) and isinstance(value, str):
        return kind(value)
    if not hasattr(kind, "from_json"):
        raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")
    return kind.from_json(value)


def _found(value: Any, keys: list[str | int]) -> str:
    """Return the value at a path in words, if it is short."""
    for key in keys:
        try:
            value = value[key] if isinstance(value, dict | list | tuple) else getattr(value, str(key))  # type: ignore[index]
        except (LookupError, AttributeError):
            return ""
    return "" if isinstance(value, dict | list | tuple | msgspec.Struct) else f", found {value!r}"


def _types_at(kind: Any, keys: list[str | int]) -> Iterator[Any]:
    """Yield the types that values at a path of a type may have."""
    if get_origin(kind) in (Union, UnionType, Annotated):
        for part in get_args(kind):
            yield from _types_at(part, keys)
    elif not keys:
        yield kind
    elif isinstance(keys[0], int):
        for part in get_args(kind)[:1]:
            yield from _types_at(part, keys[1:])
    elif _is_struct(kind) and keys[0] in _field_types(kind):
        yield from _types_at(_field_types(kind)[keys[0]], keys[1:])


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def to_text(value: Any) -> str:
    """Return a record or a result as JSON text, indented, in ASCII."""
    return json.dumps(to_json(value), indent=2) + "\n"


def option(help_text: str, **settings: Any) -> msgspec.Meta:
    """Describe a field of a request as an option of its command.

    settings: further arguments of typer.Option; `short`: other spellings, such as `-o`; `argument`: the name of
    a positional argument instead of an option.
    """
    return msgspec.Meta(description=help_text, extra=settings)


class Request(Record, frozen=True, kw_only=True):
    """The options of a command, checked; errors name fields, which the command line spells as options."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Raise a MoepruneError if fields do not go together."""
