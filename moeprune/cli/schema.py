"""`moeprune schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from moeprune.cli.reporter import Reporter


def schema(
    reporter: Reporter,
    *,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="analyze, demo, eval, export, inspect, prune, sweep (eval --sweep), or plan (plan files).",
        ),
    ],
) -> None:
    """Print the JSON Schema of a command's JSON report, or of a plan file."""
    from moeprune.report.commands import schema_of

    reporter.write(json.dumps(schema_of(name), indent=2) + "\n")
