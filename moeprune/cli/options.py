"""Options of a command from the fields of its request, and the request from their values."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import typer

from moeprune.errors import MoepruneError
from moeprune.records import Request, pack, unpack

R = TypeVar("R", bound=Request)
KEYWORD = inspect.Parameter.KEYWORD_ONLY


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

    @property
    def is_list(self) -> bool:
        """True for a tuple of any length, whose option is repeatable."""
        return get_origin(self.kind) is tuple and get_args(self.kind)[-1] is ...

    @property
    def parts(self) -> list[Field]:
        """The fields of a request within the request."""
        return fields_of(self.kind) if isinstance(self.kind, type) and issubclass(self.kind, Request) else []


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
    own, within = list[Field](), list[Field]()
    for field in fields_of(request):
        if parts := field.parts:
            within += parts[1:] if field.help else parts
            field = field._replace(kind=parts[0].kind)
        own.append(field)
    return [*{field.name: _option(field) for field in (*own, *within) if field.help is not None}.values()]


def _option(field: Field) -> inspect.Parameter:
    """Return the option of a field as Typer takes it."""
    kind, default, settings = field.kind, field.default, dict(field.settings)
    flags, argument = [field.flag, *settings.pop("short", ())], settings.pop("argument", None)
    part = get_args(kind)[0] if field.is_list else kind
    if get_origin(part) is Literal:
        settings.setdefault("metavar", "|".join(map(str, get_args(part))))
    kind = part = str if get_origin(part) in (Literal, tuple, dict) else part
    if field.is_list or get_origin(field.kind) is dict:
        kind, default = list[part], None  # type: ignore[valid-type]
    if kind is bool:
        flags, settings = [f"{field.flag}/--no-{field.flag[2:]}"], {"show_default": False}
    info: Any = typer.Option(*flags, help=field.help, show_envvar=False, **settings)  # the epilog has the variables
    if argument is not None:
        info = typer.Argument(metavar=argument, help=field.help)
    if default is msgspec.NODEFAULT:
        default = inspect.Parameter.empty
    elif kind is not bool:
        kind |= None
    return inspect.Parameter(field.name, KEYWORD, default=default, annotation=Annotated[kind, info])


def request_of(request: type[R], values: Mapping[str, Any], **others: Any) -> R:
    """Make a request of the values of its options; others: values of fields that are no options."""
    fields = fields_of(request)
    given = {field.kind for field in fields if values.get(field.name) is not None}
    made: dict[str, Any] = {}
    for field in fields:
        value = values.get(field.name, others.get(field.name, field.default))
        if parts := field.parts:
            if field.help is None:
                value = request_of(field.kind, values, **others)
            elif value is not None:
                value = request_of(field.kind, {**values, parts[0].name: value}, **others)
            elif field.kind not in given:
                for other in parts[1:]:
                    if values[other.name] is not None:
                        raise MoepruneError(f"`{other.flag}` goes with `{field.flag}`", f"add `{field.flag}`")
        elif get_origin(field.kind) is dict:
            value = parse_settings(value, field.flag)
        elif field.is_list:
            value = tuple(value or ())
        elif get_origin(field.kind) is tuple and value is not None:
            with contextlib.suppress(TypeError, ValueError):
                value = parse_value(value)
        made[field.name] = value
    try:
        return request(**made)
    except MoepruneError as error:
        names = "|".join(made)
        message = re.sub(rf"`({names})`", lambda m: f"`--{m[1].replace('_', '-')}`", error.message)
        raise MoepruneError(message, error.hint) from None


def parse_settings(texts: Iterable[str] | None, option: str) -> dict[str, Any]:
    """Read the `KEY=VALUE` texts of an option; keys differ, and JSON has the values.

    >>> parse_settings(["depth=4", "pool=avg", "mean=0.5,0.4"], "--model-arg")
    {'depth': 4, 'pool': 'avg', 'mean': (0.5, 0.4)}
    """
    settings: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise MoepruneError(f"`{option} {text}` is not KEY=VALUE", f"such as `{option} depth=4`")
        if key in settings:
            raise MoepruneError(f"`{option} {key}` is given twice")
        try:
            settings[key] = parse_value(value)
        except (TypeError, ValueError) as error:
            raise MoepruneError(f"`{option} {text}`: {error}", "give numbers, texts or lists") from None
    return settings


def parse_value(text: str) -> Any:
    """Read a value in the spelling of JSON or Python, or else as text; `none` is None, and `1,2` is a tuple.

    A TypeError or ValueError for a value that JSON does not have, such as a set or an infinite number.
    """
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python about odd literals, which are texts
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            return unpack(json.loads(json.dumps(pack(value), allow_nan=False)))
    return text
