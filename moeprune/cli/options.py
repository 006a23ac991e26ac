"""Options of a command from the fields of its request, and the request from their values."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import typer

from moeprune.cli.settings import parse_settings, parse_value
from moeprune.errors import MoepruneError
from moeprune.records import Request

R = TypeVar("R", bound=Request)
KEYWORD = inspect.Parameter.KEYWORD_ONLY
Report = Annotated[Path | None, typer.Option(help="Write a page with figures too: one HTML file that loads nothing.")]


class Field(NamedTuple):
    """A field of a request: its type without None, and its help text, if it is an option."""

    name: str
    kind: Any
    help: str | None
    settings: Mapping[str, Any]
    default: Any

    @property
    def flag(self) -> str:
        """The option, such as `--max-size`."""
        return "--" + self.name.replace("_", "-")


def fields_of(request: type[Request]) -> list[Field]:
    """Return the fields of a request."""
    hints, fields = get_type_hints(request, include_extras=True), []
    for field in msgspec.structs.fields(request):
        kind, text, settings = hints[field.name], None, dict[str, Any]()
        while get_origin(kind) in (Annotated, Union, UnionType):
            for meta in getattr(kind, "__metadata__", ()):
                text, settings = meta.description or text, {**settings, **(meta.extra or {})}
            kind = next(part for part in get_args(kind) if part is not NoneType)
        fields.append(Field(field.name, kind, text, settings, field.default))
    return fields


def options_of(request: type[Request]) -> list[inspect.Parameter]:
    """Return the options of a command that makes a request.

    A request within a request gives its first field the name of the whole, and the others follow at the end;
    without a help text of the whole, all of them do.
    """
    own: dict[str, inspect.Parameter] = {}
    within: dict[str, inspect.Parameter] = {}
    for field in fields_of(request):
        if isinstance(field.kind, type) and issubclass(field.kind, Request):
            first, *others = fields_of(field.kind)
            for other in others if field.help else (first, *others):
                within |= {option.name: option for option in _option(other)}
            field = field._replace(kind=first.kind)
        own |= {option.name: option for option in _option(field)}
    return [*own.values(), *within.values()]


def _option(field: Field) -> Iterator[inspect.Parameter]:
    """Yield the option of a field as Typer takes it, if it is one."""
    kind, default, settings = field.kind, field.default, dict(field.settings)
    flags, argument = [field.flag, *settings.pop("short", ())], settings.pop("argument", None)
    is_list = get_origin(kind) is tuple and get_args(kind)[-1] is ...
    part = get_args(kind)[0] if is_list else kind
    if get_origin(part) is Literal:
        settings.setdefault("metavar", "|".join(map(str, get_args(part))))
    if is_list:
        kind, default = list[_plain(part)], None  # type: ignore[misc]
    elif get_origin(kind) is dict:
        kind, default = list[str], None
    kind = _plain(kind)
    if kind is bool:
        flags, settings = [f"{field.flag}/--no-{field.flag[2:]}"], {"show_default": False}
    info: Any = typer.Option(*flags, help=field.help, **settings)
    if argument is not None:
        info = typer.Argument(metavar=argument, help=field.help)
    if default is msgspec.NODEFAULT:
        default = inspect.Parameter.empty
    elif kind is not bool:
        kind |= None
    if field.help is not None:
        yield inspect.Parameter(field.name, KEYWORD, default=default, annotation=Annotated[kind, info])


def _plain(kind: Any) -> Any:
    """Return the type that Typer reads: text for choices and for a list of fixed length."""
    return str if get_origin(kind) in (Literal, tuple) else kind


def request_of(request: type[R], values: Mapping[str, Any], **others: Any) -> R:
    """Make a request of the values of its options.

    Args:
        others: values of fields that are no options.
    """
    fields = fields_of(request)
    given = {field.kind for field in fields if values.get(field.name) is not None}
    made: dict[str, Any] = {}
    for field in fields:
        value = values.get(field.name, others.get(field.name, field.default))
        if isinstance(field.kind, type) and issubclass(field.kind, Request):
            first, *rest = fields_of(field.kind)
            if field.help is None:
                value = request_of(field.kind, values, **others)
            elif value is not None:
                value = request_of(field.kind, {**values, first.name: value}, **others)
            elif field.kind not in given:
                for other in rest:
                    if values[other.name] is not None:
                        raise MoepruneError(f"`{other.flag}` goes with `{field.flag}`", f"add `{field.flag}`")
        elif get_origin(field.kind) is dict:
            value = parse_settings(value, field.flag)
        elif get_origin(field.kind) is tuple and get_args(field.kind)[-1] is ...:
            value = tuple(value or ())
        elif get_origin(field.kind) is tuple and value is not None:
            with contextlib.suppress(TypeError, ValueError):
                value = parse_value(value)
        made[field.name] = value
    return request(**made)
