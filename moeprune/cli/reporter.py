"""Output of commands: files are checked before any work, messages go to stderr, the report to stdout."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from moeprune.errors import MoepruneError
from moeprune.files.disk import check_output, write_file
from moeprune.records import Report, Request, option
from moeprune.records import to_text as to_json_text

Format = Literal["text", "json", "markdown", "github", "junit"]
SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable that names the file whose Markdown GitHub shows on the page of a run."""

logger = logging.getLogger("moeprune")


class Output(Request, frozen=True, kw_only=True):
    """Options of every command for its output."""

    output_format: Annotated[
        Format, option("Format of the report: text, json, markdown, github (annotations) or junit.")
    ] = "text"
    output_file: Annotated[Path | None, option("Write the report to this file instead of stdout.")] = None
    summary: Annotated[bool, option("Append the report as Markdown to the file that $GITHUB_STEP_SUMMARY names.")] = (
        False
    )
    quiet: Annotated[bool, option("Errors only: no progress, no warnings.")] = False
    verbose: Annotated[bool, option("Log what is read and written, where it runs and how long it takes.")] = False
    force: Annotated[bool, option("Replace output files that exist.")] = False

    def check(self) -> None:
        """Raise a MoepruneError if fields exclude each other."""
        if self.quiet and self.verbose:
            raise MoepruneError("`quiet` and `verbose` exclude each other", "give one of them")


class Reporter:
    """Writer of a command's report and messages.

    Args:
        command: its name.
        output: its options.
    """

    def __init__(self, command: str, output: Output):
        self.command, self.output = command, output
        self.warnings: list[str] = []
        self.stdout: TextIO | None = sys.stdout

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Send to stderr what the package logs and what other code prints.

        Raises:
            MoepruneError: the report cannot be written.
        """
        if self.output.output_file is not None:
            check_output(self.output.output_file, self.output.force)
        if self.output.summary:
            _append_to_summary("")
        handler = _Messages(self)
        level, propagates = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if self.output.verbose else logging.WARNING)
        logger.propagate = False
        sys.stdout = sys.stderr
        try:
            with warnings.catch_warnings():
                if not self.output.verbose and not sys.warnoptions:
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
        for name, path in {**paths, "output_file": self.output.output_file}.items():
            if path is None:
                continue
            check_output(path, self.output.force)
            if name in ("plot", "report"):
                from moeprune.report.figures import check_drawing

                check_drawing(path, name)
            option = "--" + name.replace("_", "-")
            if options.setdefault(os.path.realpath(path), option) != option:
                raise MoepruneError(f"`{option}` and another output are both `{path}`", "give another path")

    def emit(self, result: Report) -> None:
        """Write the report of a result to its file or to stdout, and append it to the summary."""
        self.write(self._render(result, self.output.output_format))
        if self.output.summary:
            _append_to_summary("\n" + self._render(result, "markdown"))

    def emit_page(self, path: Path | None, *contents: Any) -> None:
        """Write the page of some contents, see moeprune.report.page, if there is a path for it."""
        if path is not None:
            from moeprune.report.html import to_html
            from moeprune.report.page import page_of

            write_file(path, to_html(page_of(*contents)), self.output.force)

    def _render(self, result: Report, kind: Format) -> str:
        if kind == "json":
            return to_json_text(result)
        from moeprune.report import ci, markdown, text
        from moeprune.report.commands import document_of

        document, command = document_of(result), f"moeprune {self.command}"
        if kind == "markdown":
            return markdown.to_markdown(document)
        if kind == "github":
            return ci.to_annotations(command, document, self.warnings)
        if kind == "junit":
            return ci.to_junit(command, document, self.warnings)
        on_terminal = self.output.output_file is None and self.stdout is not None and self.stdout.isatty()
        return text.to_text(document, shutil.get_terminal_size().columns if on_terminal else None)

    def emit_error(self, error: MoepruneError) -> None:
        """Write an error where CI servers look for it: an annotation on stdout, or a test case of JUnit."""
        from moeprune.report import ci

        command = f"moeprune {self.command}"
        if self.output.output_format == "github" and self.output.output_file is None:
            self.write(ci.annotation("error", command, str(error)) + "\n")
        elif self.output.output_format == "junit":
            self.write(ci.error_to_junit(command, error))

    def write(self, text: str) -> None:
        """Write to the output file or at once to stdout; after a failure stdout is not used any more.

        Raises:
            MoepruneError: the file or stdout cannot be written.
            BrokenPipeError: nobody reads stdout any more.
        """
        if self.output.output_file is not None:
            write_file(self.output.output_file, text, self.output.force)
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
        if not self.reporter.output.quiet or record.levelno >= logging.ERROR:
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
