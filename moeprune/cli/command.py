"""The application, and how a command becomes part of it: what it raises becomes an exit code."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from moeprune import __version__
from moeprune.errors import MoepruneError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What writing to stdout may raise; of files it has become a MoepruneError."""

app = typer.Typer(
    help="Inference-time expert pruning of Soft Mixture-of-Experts models.",
    epilog="Exit codes: 0 passed, 1 a gate failed, 2 anything wrong with the call, the input or the"
    " program, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def add_command(function: Callable[..., int | None]) -> None:
    """Add a command that returns its exit code, None for 0; what it raises is mapped to exit codes."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs) or 0
        except MoepruneError as error:
            _fail(f"error: {error}\n")
        except BrokenPipeError:
            sys.stdout = None  # nobody reads it any more
            raise typer.Exit(2) from None
        except Exception as error:
            if _is_out_of_memory(error):
                sizes = "`--batch-size`" + (" or `--latency-batch`" if kwargs.get("latency") else "")
                _fail(f"error: out of memory ({error})\n\nhint: give a smaller {sizes}\n")
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                sys.stdout = None  # else it is tried again in the end
                _fail(f"error: cannot write to stdout ({error.strerror})\n")
            _fail(f"{traceback.format_exc()}\nerror: moeprune failed; this is a defect, please report it\n")
        raise typer.Exit(code)

    app.command(function.__name__)(run)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is Python's own, torch's on a device, or torch's on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _fail(message: str) -> NoReturn:
    sys.stderr.write(message)
    raise typer.Exit(2)


def _show_version(value: bool) -> None:
    if value:
        print(f"moeprune {__version__}", flush=True)  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass
