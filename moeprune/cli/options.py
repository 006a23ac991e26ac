"""Options of a command from the fields of its request, and the request from their values."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import typer

from moeprune.cli.settings import parse_settings
from moeprune.data.spec import DataSpec
from moeprune.errors import MoepruneError
from moeprune.models.runtime import Runtime
from moeprune.models.spec import ModelSpec
from moeprune.records import Request

R = TypeVar("R", bound=Request)
KEYWORD = inspect.Parameter.KEYWORD_ONLY

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto takes CUDA if there is one.")]
Report = Annotated[
    Path | None, typer.Option(help="Write a page with figures too: one HTML file that loads nothing.")
]


@dataclass(frozen=True)
class ModelOptions:
    """How to read a checkpoint that moeprune did not write; --preprocess is for all."""

    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:FUNCTION", help="Builds the model, if it is your own. This code is run."
        ),
    ] = None
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --model: an argument of the function (repeatable)."),
    ] = None
    source: Annotated[
        str | None,
        typer.Option(
            metavar="LIBRARY[==VERSION]",
            help="The library that wrote the checkpoint, if its tensors do not tell: soft-moe,"
            " soft-moe-pytorch or soft-mixture-of-experts.",
        ),
    ] = None
    source_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An argument of the library's constructor that the tensors do not tell, such as num_heads=6"
            " (repeatable).",
        ),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(help="The entry of a training checkpoint that holds the weights, such as model_ema."),
    ] = None
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="With --model: the shape of one input.")
    ] = None
    preprocess: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="A preprocessing setting, such as resize=256 or mean=0.5 (repeatable)."
        ),
    ] = None

    def spec(self, path: Path) -> ModelSpec:
        """Return the spec of the model in a file."""
        if self.model is None and (self.model_arg or self.input_shape is not None):
            raise MoepruneError("`--model-arg` and `--input-shape` go with `--model`", "add `--model`")
        if self.model is not None and self.source_arg:
            raise MoepruneError("`--source-arg` does not go with `--model`", "give `--model-arg`")
        model_arguments = parse_settings(self.model_arg, "--model-arg")
        return ModelSpec(
            path=path,
            model=self.model,
            source=self.source,
            arguments=model_arguments or parse_settings(self.source_arg, "--source-arg"),
            key=self.key,
            input_shape=None if self.input_shape is None else _shape(self.input_shape),
            preprocess=parse_settings(self.preprocess, "--preprocess"),
        )


@dataclass(frozen=True)
class DataOptions:
    """Which samples of the data to take."""

    split: Annotated[
        str | None, typer.Option(help="Split of a built-in data set: train, calibration or test.")
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="Take only so many samples, drawn with a fixed seed.", min=1)
    ] = None

    def spec(self, data: str | None) -> DataSpec | None:
        """Return the spec of the data, if any are given."""
        if data is not None:
            return DataSpec(spec=data, split=self.split, limit=self.limit)
        if self.split is not None or self.limit is not None:
            raise MoepruneError("`--split` and `--limit` go with `--data`", "add `--data`")
        return None


@dataclass(frozen=True)
class RuntimeOptions:
    """Where and how models run."""

    device: Device = "auto"
    dtype: Annotated[
        str, typer.Option(help="float32: the precision of the weights. bf16: under autocast.")
    ] = "float32"
    batch_size: Annotated[
        int,
        typer.Option(help="Inputs of a forward pass; with scope batch, also the batch that shares experts."),
    ] = 64


GROUPS: dict[Any, Any] = {ModelSpec: ModelOptions, DataSpec: DataOptions, Runtime: RuntimeOptions}
"""Options of the fields of these types, beside the one that the field is named after."""


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """Return the parameters of a function or class with their types."""
    return [*inspect.signature(function, eval_str=True).parameters.values()]


def options_of(request: type[Request]) -> list[inspect.Parameter]:
    """Return the options of a command that makes a request: its fields that have a help text, then groups."""
    parameters, groups = [], {}
    for field in msgspec.structs.fields(request):
        kind, help_text, settings = _described(request, field.name)
        if kind in GROUPS:
            groups.update({group.name: group for group in parameters_of(GROUPS[kind])})
        if help_text is None:
            continue
        flags = [f"--{field.name}".replace("_", "-"), *settings.pop("short", ())]
        is_required = field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT
        accepted: Any = {ModelSpec: Path, DataSpec: str}.get(kind, kind)
        default: Any = inspect.Parameter.empty if is_required else field.default
        if get_origin(kind) is tuple:
            part: Any = str if get_origin(get_args(kind)[0]) is Literal else get_args(kind)[0]
            accepted, default = list[part], None
        if kind is ModelSpec and is_required:
            info: Any = typer.Argument(help=help_text, **settings)
        elif kind is bool:
            info = typer.Option(f"{flags[0]}/--no-{flags[0][2:]}", help=help_text, show_default=False)
        else:
            info = typer.Option(*flags, help=help_text, **settings)
        accepted = accepted if is_required or kind is bool else accepted | None
        parameters.append(
            inspect.Parameter(field.name, KEYWORD, default=default, annotation=Annotated[accepted, info])
        )
    return [*parameters, *(group.replace(kind=KEYWORD) for group in groups.values())]


def request_of(request: type[R], values: dict[str, Any], progress: bool, overwrite: bool) -> R:
    """Make a request of the values of its options."""
    groups = {
        kind: group(**{parameter.name: values.get(parameter.name) for parameter in parameters_of(group)})
        for kind, group in GROUPS.items()
    }
    fields: dict[str, Any] = {}
    for field in request.__struct_fields__:
        kind, _, _ = _described(request, field)
        value = values.get(field)
        if kind is Runtime:
            value = Runtime(**vars(groups[Runtime]), progress=progress)
        elif kind is DataSpec or (kind is ModelSpec and value is not None):
            value = groups[kind].spec(value)
        elif get_origin(kind) is tuple:
            value = tuple(value or ())
        elif field == "overwrite":
            value = overwrite
        fields[field] = value
    return request(**fields)


def _described(request: type[Request], field: str) -> tuple[Any, str | None, dict[str, Any]]:
    """Return the type of a field as Typer takes it, without None, its help text and its settings."""
    kind: Any = get_type_hints(request, include_extras=True)[field]
    help_text, settings = None, dict[str, Any]()
    while get_origin(kind) in (Annotated, Union, UnionType):
        for meta in getattr(kind, "__metadata__", ()):
            help_text, settings = meta.description or help_text, {**settings, **(meta.extra or {})}
        kind = next(part for part in get_args(kind) if part is not NoneType)
    return (str if get_origin(kind) is Literal else kind), help_text, settings


def _shape(text: str) -> tuple[int, int, int]:
    """Read `3,224,224`."""
    sides = text.split(",")
    if len(sides) != 3 or not all(s.isascii() and s.isdigit() and len(s) < 10 and int(s) for s in sides):
        raise MoepruneError(
            f"`--input-shape {text}` is not C,H,W", "give the shape of one input, such as 3,224,224"
        )
    channels, height, width = map(int, sides)
    return channels, height, width
