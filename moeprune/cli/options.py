"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint (.safetensors).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps; auto takes CUDA if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32: in the precision of the weights. bf16: under autocast.")]
BatchSize = Annotated[
    int, typer.Option(help="Inputs of a forward pass; with scope batch also the batch that shares experts.")
]
Limit = Annotated[int | None, typer.Option(help="Take only so many samples, drawn with a fixed seed.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]
Split = Annotated[str | None, typer.Option(help="Split of a built-in data set: train, calibration or test.")]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="Builds the model, where the checkpoint is one of your own code. That code is run.",
    ),
]
Preprocess = Annotated[
    list[str] | None,
    typer.Option(
        help="Override one preprocessing setting, such as resize=256 or mean=0.5.", metavar="KEY=VALUE"
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(help="Write a page with figures there too: one file of HTML that needs nothing beside it."),
]
OutputFormat = Annotated[
    str, typer.Option(help="Format of the report: text, json, markdown, github (annotations) or junit.")
]
OutputFile = Annotated[Path | None, typer.Option(help="Write the report there, not to stdout.")]
Summary = Annotated[
    bool,
    typer.Option(
        "--summary/--no-summary",
        show_default=False,
        help="Append the report as Markdown to the file of $GITHUB_STEP_SUMMARY.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet/--no-quiet", show_default=False, help="Errors only: no progress, no warnings."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose/--no-verbose",
        show_default=False,
        help="Say what is read, where it runs and how long it takes.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force/--no-force", show_default=False, help="Replace output files that exist.")
]
