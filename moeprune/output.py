"""Where commands write: checks before any work, and the report in the end."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError
from moeprune.files import write_text

if TYPE_CHECKING:
    from rich.console import Group

FORMATS = ("text", "json")
TEXT_WIDTH = 160
"""Columns of text that goes to a file or a pipe: wide enough for every table."""


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a MoepruneError if an option has a value that is not among its choices."""
    if value not in choices:
        raise MoepruneError(f"`{option} {value}` is unknown", f"give one of {', '.join(choices)}")


def check_report(output_format: str, output_file: Path | None, force: bool) -> None:
    """Raise a MoepruneError if a report cannot be given in this format, or not written there."""
    check_choice("--output-format", output_format, FORMATS)
    if output_file is not None:
        check_output(output_file, force)


def check_output(path: Path, force: bool) -> None:
    """Refuse an output path before any work is done for it."""
    try:
        exists, is_file = path.exists(), path.is_file()
    except OSError as error:
        raise MoepruneError(f"cannot write `{path}` ({error.strerror})") from None
    if path.is_dir():
        raise MoepruneError(f"`{path}` is a directory, expected a file to write")
    if exists and not is_file:
        raise MoepruneError(f"`{path}` is no regular file, expected one to write")
    if exists and not force:
        raise MoepruneError(f"`{path}` exists", "give another path, or `--force` to replace it")
    if not path.parent.is_dir():
        raise MoepruneError(f"no directory `{path.parent}` for `{path}`", "make it first")
    if not os.access(path.parent, os.W_OK):
        raise MoepruneError(
            f"cannot write into `{path.parent}`",
            "check its permissions, and whether its file system is read-only",
        )


def check_outputs(output: Path | None, save_plan: Path | None, output_file: Path | None, force: bool) -> None:
    """Refuse what `prune` may not write, before any work is done for it."""
    for path in (output, save_plan):
        if path is not None:
            check_output(path, force)
            check_apart(path, output_file)
    if output is not None and save_plan is not None:
        check_apart(output, save_plan)


def check_apart(output: Path, output_file: Path | None) -> None:
    """Raise a MoepruneError if the report would replace what the command writes."""
    if output_file is not None and os.path.realpath(output_file) == os.path.realpath(output):
        raise MoepruneError(f"`--output-file` and `--output` are both `{output}`", "give another path")


def warn(message: str) -> None:
    """Say something on stderr."""
    sys.stderr.write(f"warning: {message}\n")


def emit(
    found: Mapping[str, Any],
    render: Callable[[Mapping[str, Any]], Group],
    output_format: str,
    output_file: Path | None,
) -> None:
    """The report as text or JSON, to a file or to stdout."""
    from rich.console import Console
    from rich.table import Table

    if output_format == "json":
        text = json.dumps(found, indent=2) + "\n"
    else:
        on_terminal = output_file is None and sys.stdout.isatty()
        text_width = shutil.get_terminal_size().columns if on_terminal else TEXT_WIDTH
        console = Console(
            width=text_width,
            height=25,  # without it Rich takes no width on a dumb terminal
            force_terminal=on_terminal,
            no_color=None if on_terminal else True,
            highlight=False,
            markup=False,
            emoji=False,
        )
        with console.capture() as capture:
            for part in render(found).renderables:
                # A table is never cut: on a narrower terminal its lines wrap.
                console.width = max(text_width, TEXT_WIDTH) if isinstance(part, Table) else text_width
                console.print(part)
        text = "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
    if output_file is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        write_text(output_file, text)
