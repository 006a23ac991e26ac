"""`moeprune convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from moeprune.cli.reporter import Reporter
from moeprune.errors import MoepruneError
from moeprune.models.spec import ModelSpec
from moeprune.records import Request, option


class ConvertRequest(Request, frozen=True, kw_only=True):
    """A checkpoint, and the layout to write it in."""

    checkpoint: Annotated[
        ModelSpec, option("A checkpoint of a known library, or of moeprune.", metavar="FILE")
    ]
    output: Annotated[Path, option("The checkpoint to write; .pt or safetensors.", short=("-o",))]
    to: Annotated[str, option("What to write: moeprune, or the library that is to load it.")] = "moeprune"


def convert(reporter: Reporter, request: ConvertRequest) -> None:
    """Take a checkpoint of another library or of your own code, or give one back.

    Proves on random images that the library's own model computes the same, where it is installed.
    """
    spec, output, to, checkpoint = request.checkpoint, request.output, request.to, request.checkpoint.path
    reporter.check_outputs(output=output)
    from moeprune.models.libraries import LAYER_LIBRARIES, SOURCES

    for name, value, known in (
        ("--to", to, ("moeprune", *SOURCES, *LAYER_LIBRARIES)),
        ("--source", None if spec.model else spec.source, tuple(SOURCES)),
    ):
        if value is not None and value not in known:
            raise MoepruneError(f"`{name} {value}` is unknown", f"give one of {', '.join(known)}")
    texts = {key: json.dumps(value, separators=(",", ":")) for key, value in spec.arguments.items()}
    arguments = {key: text.strip('"').replace("null", "none") for key, text in texts.items()}
    from moeprune.models import adoption, conversion
    from moeprune.models.results import Conversion

    converted: adoption.Adopted | conversion.Converted
    if to != "moeprune" and adoption.is_own_model(checkpoint):
        converted = adoption.give_back(checkpoint, output, to, spec.model, reporter.force)
    elif spec.model is None:
        converted = conversion.convert(
            checkpoint, output, to, spec.source, arguments, spec.preprocess, spec.key, reporter.force
        )
    elif to != "moeprune" or conversion.is_ours(checkpoint):
        raise MoepruneError(
            f"`--model` takes in a file that your own code wrote: not `{checkpoint}` with `--to {to}`",
            "leave `--model` out, or give that file",
        )
    else:
        if spec.input_shape is None:
            raise MoepruneError(
                "`--model` needs `--input-shape`",
                "give the shape of one input, such as --input-shape 3,224,224",
            )
        converted = adoption.adopt_file(
            checkpoint,
            output,
            spec.model,
            spec.arguments,
            spec.input_shape,
            spec.key,
            spec.preprocess,
            spec.source,
            reporter.force,
        )
    found = Conversion(
        checkpoint=str(checkpoint),
        output=str(output),
        **converted.to_json(),
        model=converted.model.cost(),
    )
    reporter.emit(found)
