"""`moeprune convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moeprune.cli.reporter import Reporter
from moeprune.errors import MoepruneError
from moeprune.models.spec import LIBRARIES, ModelSpec
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
    spec, output, to = request.checkpoint, request.output, request.to
    reporter.check_outputs(output=output)
    if to not in LIBRARIES:
        raise MoepruneError(f"`--to {to}` is unknown", f"give one of {', '.join(LIBRARIES)}")
    from moeprune.models.export import export
    from moeprune.models.model import save
    from moeprune.models.opening import open_model
    from moeprune.models.results import Export

    opened = open_model(spec)
    if to != "moeprune":
        reporter.emit(export(opened, output, to, overwrite=reporter.force))
        return
    if opened.reading is None:
        raise MoepruneError(f"`{spec.path}` is a checkpoint of moeprune already", "give `--to LIBRARY`")
    save(opened, output, reporter.force)
    found = Export(
        output=str(output),
        to=to,
        source=opened.details.source,
        arguments=opened.reading.arguments,
        parity=opened.reading.parity,
        model=opened.cost(),
    )
    reporter.emit(found)
