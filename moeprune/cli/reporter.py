"""Output of commands: files are checked before any work, messages go to stderr, the report to stdout."""

import contextlib
import importlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

from msgspec.structs import replace

from moeprune.errors import MoepruneError, streams
from moeprune.files.disk import check_output, write_file
from moeprune.records import Report, Request, option
from moeprune.records import to_text as to_json_text

R = TypeVar("R", bound=Report)
Format = Literal["text", "json", "markdown", "github", "junit"]
SUMMARY = "GITHUB_STEP_SUMMARY"  # the variable that names the file whose Markdown GitHub shows on the page of a run

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


DRAWINGS = {
    "plot": ("a plot", (".png", ".svg"), ("matplotlib",)),
    "report": ("a page of HTML", (".html", ".htm"), ("matplotlib", "jinja2")),
}
"""By option: the kind of file, its suffixes, and the modules that it needs."""


def check_drawing(path: Path, option: str) -> None:
    """Raise a MoepruneError if the file of an option in DRAWINGS cannot be drawn."""
    kind, suffixes, modules = DRAWINGS[option]
    if path.suffix not in suffixes:
        raise MoepruneError(f"`{path}` is not {kind}", f"give a path that ends with {' or '.join(suffixes)}")
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            hint = f"install what is missing: `pip install {' '.join(modules)}`"
            raise MoepruneError(f"pages and plots need {name}", hint) from None


class Reporter(logging.Handler):
    """Writer of a command's report and messages; collects the warnings."""

    def __init__(self, command: str, output: Output):
        super().__init__()
        self.command, self.output = f"moeprune {command}", output
        self.warnings: list[str] = []
        self.stdout: TextIO | None = sys.stdout

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Send to stderr what the package logs and what other code prints; first see that the report can be written."""
        if self.output.output_file is not None:
            check_output(self.output.output_file, self.output.force)
        if self.output.summary:
            _append_to_summary("")
        level, propagates = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.INFO if self.output.verbose else logging.WARNING)
        logger.propagate = False
        sys.stdout, streams.is_command = sys.stderr, True
        try:
            with warnings.catch_warnings():
                if not self.output.verbose and not sys.warnoptions:
                    warnings.simplefilter("ignore")
                yield
        finally:
            sys.stdout, streams.is_command = self.stdout, False
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagates

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message to stderr."""
        message = record.getMessage()
        if record.levelno == logging.WARNING:
            self.warnings.append(message)
        if not self.output.quiet or record.levelno >= logging.ERROR:
            sys.stderr.write(f"{record.levelname.lower()}: {message}\n")

    def check_outputs(self, folder: Path | None = None, **paths: Path | None) -> None:
        """Refuse files (by option, with underscores) that a command cannot write, before any work is done for them.

        folder: that `--output` names.
        """
        options = {} if folder is None else {os.path.realpath(folder): "--output"}
        for name, path in {**paths, "output_file": self.output.output_file}.items():
            if path is None:
                continue
            check_output(path, self.output.force)
            if name in DRAWINGS:
                check_drawing(path, name)
            option = "--" + name.replace("_", "-")
            if options.setdefault(os.path.realpath(path), option) != option:
                raise MoepruneError(f"`{option}` and another output are both `{path}`", "give another path")

    def show(self, result: Report) -> None:
        """Write the report of a result to its file or to stdout, and append it to the summary."""
        result = self._with_warnings(result)
        self.write(self._render(result, self.output.output_format))
        if self.output.summary:
            _append_to_summary("\n" + self._render(result, "markdown"))

    def _with_warnings(self, result: R) -> R:
        return replace(result, warnings=tuple(self.warnings))

    def write_page(self, path: Path | None, result: Any, *origins: Any) -> None:
        """Write the page of a result, see moeprune.report.page, if there is a path for it."""
        if path is not None:
            from moeprune.report.html import to_html
            from moeprune.report.page import page_of

            write_file(path, to_html(page_of(self._with_warnings(result), *origins)), self.output.force)

    def _render(self, result: Report, kind: Format) -> str:
        if kind == "json":
            return to_json_text(result)
        from moeprune.report import ci, markdown, text
        from moeprune.report.commands import document_of
        from moeprune.report.document import with_warnings

        document = document_of(result, self.output.verbose)
        if kind == "markdown":
            return markdown.to_markdown(with_warnings(document, result.warnings))
        if kind == "github":
            return ci.to_annotations(self.command, document, self.warnings)
        if kind == "junit":
            return ci.to_junit(self.command, document, self.warnings)
        if self.output.output_file is not None:  # whose readers do not see stderr
            document = with_warnings(document, result.warnings)
        on_terminal = self.output.output_file is None and self.stdout is not None and self.stdout.isatty()
        return text.to_text(document, shutil.get_terminal_size().columns if on_terminal else None)

    def show_error(self, error: MoepruneError) -> None:
        """Write an error where CI servers look for it: an annotation on stdout, or a test case of JUnit."""
        from moeprune.report import ci

        if self.output.output_format == "github" and self.output.output_file is None:
            self.write(ci.annotation("error", self.command, str(error)) + "\n")
        elif self.output.output_format == "junit":
            self.write(ci.error_to_junit(self.command, error))

    def write(self, text: str) -> None:
        """Write to the output file or at once to stdout; after a failure stdout is not used any more.

        A MoepruneError if it cannot be written, a BrokenPipeError if nobody reads stdout any more.
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


def _append_to_summary(text: str) -> None:
    """Append Markdown to the file that `--summary` is for, or raise a MoepruneError."""
    path = os.environ.get(SUMMARY)
    if not path:
        hint = "leave `--summary` out, or set the variable outside GitHub Actions"
        raise MoepruneError(f"`--summary` appends to the file that `${SUMMARY}` names, which is not set", hint)
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise MoepruneError(f"`${SUMMARY}`: cannot append to `{path}` ({error})") from None
