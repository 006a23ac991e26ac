"""`moeprune config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperOption

from moeprune.cli.command import default_map, place
from moeprune.cli.reporter import Reporter

SOURCES = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


def config(reporter: Reporter, context: typer.Context) -> None:
    """Show what is in force.

    The value of every option of every command where the command line does not say it, and where it comes
    from: the environment, moeprune.toml or pyproject.toml, or its default.
    """
    from moeprune.report import commands as report

    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    configuration = context.meta["configuration"]
    found = {
        "schema_version": 1,
        "file": None if configuration.path is None else str(configuration.path),
        "commands": {name: _in_force(name, command, context) for name, command in commands.items()},
    }
    reporter.emit(found, report.configuration)


def _in_force(name: str, command: Any, context: typer.Context) -> dict[str, Any]:
    """Value, source and place of each option of a command."""
    of_command = typer.Context(command, parent=context.parent, info_name=name)
    of_command.default_map = default_map(context.meta["configuration"], name)
    options = {}
    for option in command.params:
        if not isinstance(option, TyperOption):
            continue
        value, source = option.consume_value(of_command, {})
        of_command.set_parameter_source(option.name, source)
        if source.name != "DEFAULT":
            value = option.process_value(of_command, value)
        options[option.name.replace("_", "-")] = {
            "value": _json_value(option.show_default if value is None and _is_said(option) else value),
            "source": SOURCES[source.name],
            "place": place(of_command, option),
        }
    return options


def _is_said(option: TyperOption) -> bool:
    """Whether the help says what an option without a value stands for."""
    return isinstance(option.show_default, str)


def _json_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json_value(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else None
