"""Where commands write: checks before any work, messages meanwhile, and the report in the end."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError
from moeprune.files.writing import write_text

if TYPE_CHECKING:
    from moeprune.report.document import Document

FORMATS = ("text", "json", "markdown", "github", "junit")
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file whose Markdown GitHub shows on the page of a run."""

logger = logging.getLogger("moeprune")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a MoepruneError if an option has a value that is not among its choices."""
    if value not in choices:
        raise MoepruneError(f"`{option} {value}` is unknown", f"give one of {', '.join(choices)}")


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


def warn(message: str) -> None:
    """Say something that is no error; the commands show it on stderr and in reports of CI servers."""
    logger.warning(message)


@contextlib.contextmanager
def messages(quiet: bool, verbose: bool) -> Iterator[list[str]]:
    """Let messages of the package go to stderr meanwhile, and nothing that libraries warn of.

    Args:
        quiet: not even warnings.
        verbose: also what is read, where it runs and how long it takes, and warnings of libraries.

    Yields:
        The warnings so far.
    """
    handler = _Messages(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield handler.warnings
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


class _Messages(logging.Handler):
    """Writes messages from a level on to stderr, and remembers the warnings."""

    def __init__(self, shown: int):
        super().__init__()
        self.shown = shown
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno == logging.WARNING:
            self.warnings.append(message)
        if record.levelno >= self.shown:
            sys.stderr.write(f"{record.levelname.lower()}: {message}\n")


@dataclass(frozen=True)
class Reporter:
    """How a command reports, as the options that all commands have say it.

    command: its name, such as `eval`. output_format: one of FORMATS. output_file: None for stdout.
    summary: Markdown is appended there too, if it is not None. progress: show progress on a terminal.
    force: replace files that exist. warnings: those so far.

    Raises:
        MoepruneError: the report cannot be given in this format, or not written there.
    """

    command: str
    output_format: str
    output_file: Path | None
    summary: Path | None
    progress: bool
    force: bool
    warnings: Sequence[str]

    def __post_init__(self) -> None:
        check_choice("--output-format", self.output_format, FORMATS)
        if self.output_file is not None:
            check_output(self.output_file, self.force)

    def check_outputs(self, **paths: Path | None) -> None:
        """Refuse what a command is to write, before any work is done for it.

        Args:
            paths: by the options that name them, with underscores; None is not written.
        """
        options: dict[str, str] = {}
        for name, path in {**paths, "output_file": self.output_file}.items():
            if path is None:
                continue
            check_output(path, self.force)
            option = "--" + name.replace("_", "-")
            if options.setdefault(os.path.realpath(path), option) != option:
                raise MoepruneError(f"`{option}` and another output are both `{path}`", "give another path")

    def emit(self, found: Mapping[str, Any], describe: Callable[[Mapping[str, Any]], Document]) -> None:
        """Give the report, to a file or to stdout, and append it to the summary.

        Args:
            found: JSON values.
            describe: makes a document of them.
        """
        text = self._render(found, describe)
        if self.output_file is not None:
            write_text(self.output_file, text)
        else:
            print_out(text)
        if self.summary is not None:
            from moeprune.report.markdown import to_markdown

            append(self.summary, f"\n{to_markdown(describe(found))}")

    def _render(self, found: Mapping[str, Any], describe: Callable[[Mapping[str, Any]], Document]) -> str:
        if self.output_format == "json":
            return json.dumps(found, indent=2) + "\n"
        command, gates = f"moeprune {self.command}", found.get("gates") or ()
        if self.output_format == "markdown":
            from moeprune.report.markdown import to_markdown

            return to_markdown(describe(found))
        if self.output_format == "github":
            from moeprune.report.annotations import to_annotations

            return to_annotations(command, describe(found), gates, self.warnings)
        if self.output_format == "junit":
            from moeprune.report.junit import to_junit

            return to_junit(command, describe(found), gates, self.warnings)
        from moeprune.report.text import to_text

        on_terminal = self.output_file is None and sys.stdout.isatty()
        return to_text(describe(found), shutil.get_terminal_size().columns if on_terminal else None)


def emit_error(command: str, error: MoepruneError, output_format: str, output_file: Path | None) -> None:
    """Give an error where CI servers look for it: as an annotation on stdout, or as a test case of JUnit.

    Args:
        command: its name.
        error: what is wrong.
        output_format: one of FORMATS; with others than `github` and `junit` nothing is written.
        output_file: of the report that is not given, None for stdout; annotations are read from stdout alone.
    """
    if output_format == "github" and output_file is None:
        from moeprune.report.annotations import annotation

        print_out(annotation("error", f"moeprune {command}", str(error)) + "\n")
    elif output_format == "junit":
        from moeprune.report.junit import error_to_junit

        text = error_to_junit(f"moeprune {command}", error)
        if output_file is None:
            print_out(text)
        else:
            write_text(output_file, text)


def print_out(text: str) -> None:
    """Write to stdout, at once.

    Raises:
        BrokenPipeError: nobody reads it any more; nothing is written to stdout from then on.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None
        raise


def summary_file() -> Path:
    """Where `--summary` appends.

    Raises:
        MoepruneError: the variable SUMMARY is not set, or names what cannot be appended to.
    """
    name = os.environ.get(SUMMARY)
    if not name:
        raise MoepruneError(
            f"`--summary` appends to the file that `${SUMMARY}` names, which is not set",
            "leave `--summary` out, or set the variable where it is not GitHub Actions that runs this",
        )
    path = Path(name)
    append(path, "")
    return path


def append(path: Path, text: str) -> None:
    """Write at the end of a text file in UTF-8, which is made if there is none.

    Raises:
        MoepruneError: that is not possible.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise MoepruneError(f"`${SUMMARY}`: cannot append to `{path}` ({error})") from None
