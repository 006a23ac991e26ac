"""The one exception that a user is meant to see, and how code of the user's is run so that it raises this one."""

import contextlib
import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class MoepruneError(Exception):
    """Something is wrong with the call, the input or a file; the command exits with 2.

    message: what is wrong, with the file, key or option in backticks, what was found and what was expected.
    hint: what to do next.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


ARGUMENTS = {
    "classes": "class_names", "ignore_layer": "ignore_layers", "latency": "latency_batches",
    "latency_batch": "latency_batches", "model_arg": "arguments", "source_arg": "arguments",
}  # fmt: skip
"""Arguments of the Python API that do not have the name of their option."""


def in_words_of_python(text: str) -> str:
    """Return a text about options of the command line as one about arguments of the Python API.

    >>> in_words_of_python("`--max-size 0.1` is too small: keep `--scope static`, or run `moeprune eval`")
    '`max_size=0.1` is too small: keep `scope="static"`, or run `moeprune.evaluate`'
    """
    text = re.sub(r"`moeprune (analyze|prune|eval|export)`", lambda m: f"`moeprune.{m[1]}`", text)
    text = text.replace("`moeprune.eval`", "`moeprune.evaluate`").replace("`--force`", "`overwrite=True`")
    return re.sub(r"`(--[a-z][^`]*)`", lambda m: f"`{_arguments(m[1].split())}`", text)


def _arguments(words: list[str]) -> str:
    """Return `--name value` words as keyword arguments."""
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found.append(ARGUMENTS.get(name, name))
        elif found[-1] == "arguments":
            found[-1] = word
        elif re.fullmatch(r"\d+(,\d+)+", word):
            found[-1] += f"=({word.replace(',', ', ')})"
        else:
            found[-1] += f"={word}" if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) else f'="{word}"'
    return ", ".join(found)


def called_from_python(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function whose errors speak of arguments, not of options."""

    @functools.wraps(function)
    def call(*positional: Any, **named: Any) -> T:
        try:
            return function(*positional, **named)
        except MoepruneError as error:
            error.message, error.hint = in_words_of_python(error.message), error.hint and in_words_of_python(error.hint)
            raise

    return call


def listed(names: Collection[str], most: int = 5) -> str:
    """Return the first names, and how many follow: `a`, `b` and 3 more."""
    shown = ", ".join(f"`{name}`" for name in list(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class StopForward(BaseException):
    """Ends a forward pass once every layer of interest has been observed; no `except Exception` stops it."""


@contextlib.contextmanager
def user_code(what: str, hint: str | None = None) -> Iterator[None]:
    """Run code of the user's: an import, a factory, a forward pass, a loader of data.

    While a command runs, stdout goes to stderr, also that of C and of other processes, and `sys.argv` is the program's
    name alone.

    what: the beginning of the error's message, such as "`--model nets:build` fails". hint: of the error.

    Raises:
        MoepruneError: the code raised something or ended the program. Errors of moeprune's own, a lack of memory
            and Ctrl-C pass unchanged.
    """
    try:
        with streams if streams.is_command else contextlib.nullcontext():
            yield
    except (MoepruneError, StopForward, KeyboardInterrupt, GeneratorExit):
        raise
    except SystemExit as end:
        raise MoepruneError(f"{what}: it ended the program with `sys.exit({end.code!r})`", hint) from None
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        raise MoepruneError(f"{what}: {type(error).__name__}: {error}", hint) from None


class Streams:
    """Sends stdout to stderr and hides the program's arguments until the last of several threads has left."""

    is_command = False  # the streams are those of a command, not of a caller in Python

    def __init__(self) -> None:
        self.lock, self.users, self.descriptor = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            if self.users > 1:
                return
            self.stdout, self.argv = sys.stdout, sys.argv
            _flush(self.stdout)
            with contextlib.suppress(OSError):  # one of them is closed
                self.descriptor = os.dup(1)
                os.dup2(2, 1)
            sys.stdout, sys.argv = sys.stderr or sys.stdout, sys.argv[:1]

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users:
                return
            _flush(self.stdout)  # what code wrote to `sys.__stdout__`
            sys.stdout, sys.argv = self.stdout, self.argv
            if self.descriptor >= 0:
                os.dup2(self.descriptor, 1)
                os.close(self.descriptor)
                self.descriptor = -1


streams = Streams()


def _flush(stdout: Any) -> None:
    for stream in filter(None, (stdout, sys.__stdout__)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for a lack of memory on the host or a device; torch need not be imported."""
    is_of_device = type(error).__name__ == "OutOfMemoryError"
    return is_of_device or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
