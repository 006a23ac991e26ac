"""`moeprune schema`."""

from __future__ import annotations

import json
from typing import Annotated

from moeprune.cli.reporter import Reporter
from moeprune.records import Request, option

NAMES = "analyze, demo, eval, export, inspect, prune, sweep (of eval --sweep), or plan (a plan file)."


class SchemaRequest(Request, frozen=True, kw_only=True):
    """The schema to print."""

    name: Annotated[str, option(NAMES, argument="NAME")]


def schema(reporter: Reporter, request: SchemaRequest) -> None:
    """Print the JSON Schema of a command's JSON report, or of a plan file."""
    from moeprune.report.commands import schema_of

    reporter.write(json.dumps(schema_of(request.name), indent=2) + "\n")
