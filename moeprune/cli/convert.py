"""`moeprune convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.options import Factory, Preprocess
from moeprune.cli.reporter import Reporter, check_choice
from moeprune.cli.settings import parse_settings
from moeprune.errors import MoepruneError


def convert(
    reporter: Reporter,
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A checkpoint of a known library, or of moeprune (.safetensors, .pt, ...)."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The checkpoint to write; by its suffix as safetensors or .pt."),
    ],
    to: Annotated[
        str, typer.Option(help="What to write: moeprune, or the library that is to load it.")
    ] = "moeprune",
    source: Annotated[
        str | None,
        typer.Option(
            help="The library that wrote the file, where its tensors do not tell; with --model also its"
            " release, such as soft-mixture-of-experts==0.1.0, where that is not the installed one."
        ),
    ] = None,
    source_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="What the tensors cannot tell, as the library's constructor takes it, such as num_heads=6"
            " (repeatable).",
            metavar="KEY=VALUE",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Which entry of a training checkpoint holds the weights, such as model_ema."),
    ] = None,
    model: Factory = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="With --model: a keyword argument of the function, a Python literal or else a text"
            " (repeatable).",
            metavar="KEY=VALUE",
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(help="With --model: the shape of one input, such as 3,224,224.", metavar="C,H,W"),
    ] = None,
    preprocess: Preprocess = None,
) -> None:
    """Take a checkpoint of another library or of your own code, or give one back.

    Proves on random images that the library's own model computes the same, where it is installed.
    """
    reporter.check_outputs(output=output)
    from moeprune.models.libraries import LAYER_LIBRARIES, SOURCES
    from moeprune.models.libraries.given import parse_settings as parse_texts

    check_choice("--to", to, ("moeprune", *SOURCES, *LAYER_LIBRARIES))
    if source is not None and model is None:
        check_choice("--source", source, tuple(SOURCES))
    arguments = parse_texts(source_arg or ())
    if model is None and (model_arg or input_shape is not None):
        raise MoepruneError(
            "`--model-arg` and `--input-shape` go with `--model`", "say what builds the model"
        )
    if model is not None and arguments:
        raise MoepruneError("`--source-arg` does not go with `--model`", "give `--model-arg`")
    settings = parse_settings(preprocess, "--preprocess")
    from moeprune.models import adoption, conversion
    from moeprune.models.adopted import parse_arguments, parse_shape
    from moeprune.models.results import Conversion
    from moeprune.report import commands as report

    converted: adoption.Adopted | conversion.Converted
    if to != "moeprune" and adoption.is_own_model(checkpoint):
        converted = adoption.give_back(checkpoint, output, to, model, reporter.force)
    elif model is None:
        converted = conversion.convert(
            checkpoint, output, to, source, arguments, settings, key, reporter.force
        )
    elif to != "moeprune" or conversion.is_ours(checkpoint):
        raise MoepruneError(
            f"`--model` takes in a file that your own code wrote: not `{checkpoint}` with `--to {to}`",
            "leave `--model` out, or give that file",
        )
    else:
        shape, own_arguments = parse_shape(input_shape), parse_arguments(model_arg or ())
        converted = adoption.adopt_file(
            checkpoint, output, model, own_arguments, shape, key, settings, source, reporter.force
        )
    found = Conversion(
        checkpoint=str(checkpoint),
        output=str(output),
        **converted.to_json(),
        model=converted.model.cost(),
    )
    reporter.emit(found, report.conversion)
