"""Where commands write: outputs are checked before any work, messages go to stderr, the report to stdout."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from moeprune.errors import MoepruneError
from moeprune.files.writing import check_output, write_text
from moeprune.records import Report
from moeprune.records import to_text as to_json_text

if TYPE_CHECKING:
    from moeprune.report.document import Document

FORMATS = ("text", "json", "markdown", "github", "junit")
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file whose Markdown GitHub shows on the page of a run."""

logger = logging.getLogger("moeprune")


@dataclass
class Reporter:
    """How a command reports; all fields but its name are options of every command."""

    command: str
    output_format: Annotated[
        str, typer.Option(help="Format of the report: text, json, markdown, github (annotations) or junit.")
    ] = "text"
    output_file: Annotated[
        Path | None, typer.Option(help="Write the report to this file instead of stdout.")
    ] = None
    summary: Annotated[
        bool,
        typer.Option(
            "--summary/--no-summary",
            show_default=False,
            help="Append the report as Markdown to the file that $GITHUB_STEP_SUMMARY names.",
        ),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option("--quiet/--no-quiet", show_default=False, help="Errors only: no progress, no warnings."),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose/--no-verbose",
            show_default=False,
            help="Log what is read and written, where it runs and how long it takes.",
        ),
    ] = False
    force: Annotated[
        bool, typer.Option("--force/--no-force", show_default=False, help="Replace output files that exist.")
    ] = False
    warnings: list[str] = field(default_factory=list, init=False)
    stdout: TextIO | None = field(default_factory=lambda: sys.stdout, init=False)

    @property
    def progress(self) -> bool:
        """True if progress is shown where stderr is a terminal."""
        return not self.quiet

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Check the options, then send to stderr what the package logs and what other code prints.

        Raises:
            MoepruneError: the report cannot be given in this format, or not written where it is to go.
        """
        if self.output_format not in FORMATS:
            raise MoepruneError(
                f"`--output-format {self.output_format}` is unknown", f"give one of {', '.join(FORMATS)}"
            )
        if self.quiet and self.verbose:
            raise MoepruneError("`--quiet` and `--verbose` exclude each other", "give one of them")
        if self.output_file is not None:
            check_output(self.output_file, self.force)
        if self.summary:
            _append_to_summary("")
        handler = _Messages(self)
        level, propagates = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if self.verbose else logging.WARNING)
        logger.propagate = False
        sys.stdout = sys.stderr
        try:
            with warnings.catch_warnings():
                if not self.verbose and not sys.warnoptions:
                    warnings.simplefilter("ignore")
                yield
        finally:
            sys.stdout = self.stdout
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagates

    def check_outputs(self, **paths: Path | None) -> None:
        """Refuse files that a command is to write, before any work is done for them.

        Args:
            paths: by the options that name them, with underscores; None is not written.
        """
        options: dict[str, str] = {}
        for name, path in {**paths, "output_file": self.output_file}.items():
            if path is None:
                continue
            check_output(path, self.force)
            if name == "report":
                from moeprune.report.html import check_page

                check_page(path)
            option = "--" + name.replace("_", "-")
            if options.setdefault(os.path.realpath(path), option) != option:
                raise MoepruneError(f"`{option}` and another output are both `{path}`", "give another path")

    def emit(self, result: Report) -> None:
        """Write the report of a result to its file or to stdout, and append it to the summary."""
        self.write(self._render(result))
        if self.summary:
            from moeprune.report.commands import document_of
            from moeprune.report.markdown import to_markdown

            _append_to_summary(f"\n{to_markdown(document_of(result))}")

    def emit_page(self, path: Path | None, make: Callable[[], Document]) -> None:
        """Write a page with figures, if there is a path for it."""
        if path is not None:
            from moeprune.report.html import to_html

            write_text(path, to_html(make()), self.force)

    def _render(self, result: Report) -> str:
        if self.output_format == "json":
            return to_json_text(result)
        from moeprune.report.commands import document_of

        document = document_of(result)
        command, gates = f"moeprune {self.command}", getattr(result, "gates", ())
        if self.output_format == "markdown":
            from moeprune.report.markdown import to_markdown

            return to_markdown(document)
        if self.output_format == "github":
            from moeprune.report.annotations import to_annotations

            return to_annotations(command, document, gates, self.warnings)
        if self.output_format == "junit":
            from moeprune.report.junit import to_junit

            return to_junit(command, document, gates, self.warnings)
        from moeprune.report.text import to_text

        on_terminal = self.output_file is None and self.stdout is not None and self.stdout.isatty()
        return to_text(document, shutil.get_terminal_size().columns if on_terminal else None)

    def emit_error(self, error: MoepruneError) -> None:
        """Write an error where CI servers look for it: an annotation on stdout, or a test case of JUnit."""
        command = f"moeprune {self.command}"
        if self.output_format == "github" and self.output_file is None:
            from moeprune.report.annotations import annotation

            self.write(annotation("error", command, str(error)) + "\n")
        elif self.output_format == "junit":
            from moeprune.report.junit import error_to_junit

            self.write(error_to_junit(command, error))

    def write(self, text: str) -> None:
        """Write to the output file or at once to stdout; after a failure stdout is not used any more.

        Raises:
            MoepruneError: the file or stdout cannot be written.
            BrokenPipeError: nobody reads stdout any more.
        """
        if self.output_file is not None:
            write_text(self.output_file, text, self.force)
        elif self.stdout is not None:
            if isinstance(self.stdout, io.TextIOWrapper):
                self.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
            try:
                self.stdout.write(text)
                self.stdout.flush()
            except OSError as error:
                self.stdout = sys.stdout = None  # else it is flushed again at exit
                if isinstance(error, BrokenPipeError):
                    raise
                raise MoepruneError(f"cannot write to stdout ({error.strerror})") from None


class _Messages(logging.Handler):
    """Writes messages to stderr, and collects the warnings."""

    def __init__(self, reporter: Reporter):
        super().__init__()
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno == logging.WARNING:
            self.reporter.warnings.append(message)
        if not self.reporter.quiet or record.levelno >= logging.ERROR:
            sys.stderr.write(f"{record.levelname.lower()}: {message}\n")


def _append_to_summary(text: str) -> None:
    """Append Markdown to the file that `--summary` is for.

    Raises:
        MoepruneError: the variable SUMMARY is not set, or names a file that cannot be appended to.
    """
    path = os.environ.get(SUMMARY)
    if not path:
        raise MoepruneError(
            f"`--summary` appends to the file that `${SUMMARY}` names, which is not set",
            "leave `--summary` out, or set the variable outside GitHub Actions",
        )
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise MoepruneError(f"`${SUMMARY}`: cannot append to `{path}` ({error})") from None
