"""Files that are read: which kinds are refused at once, and JSON; no torch."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path
from typing import Any

import msgspec

from moeprune.errors import MoepruneError

MAX_LENGTH = 100_000_000
"""Bytes of the longest JSON that is read, as in the header of a safetensors file."""


def require_file(path: Path, expected: str) -> None:
    """Raise a MoepruneError unless a path leads to a regular file with contents: a pipe may never end.

    expected: what the file should be, in words.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MoepruneError(f"no file `{path}`") from None
    except (OSError, ValueError) as error:
        raise cannot_read(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise MoepruneError(f"`{path}` is a folder, expected {expected}")
    if not stat.S_ISREG(status.st_mode):
        raise MoepruneError(f"`{path}` is not a regular file, expected {expected}")
    if not status.st_size:
        raise MoepruneError(f"`{path}` is empty, expected {expected}", "write it again")


def version_of(file: str | Path | int) -> tuple[int, int, int] | None:
    """Return what differs between versions of a file, given by path or descriptor; None if it is missing."""
    try:
        status = os.stat(file)  # noqa: PTH116 (takes a descriptor, too)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_json(path: Path, expected: str) -> Any:
    """Read a JSON file in UTF-8, which may begin with a byte order mark; expected: its kind in words.

    Raises:
        MoepruneError: the file cannot be read, or is not JSON.
    """
    require_file(path, expected)
    try:
        if path.stat().st_size > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} bytes")
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise cannot_read(path, error) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}` is not JSON ({error})", f"expected {expected}") from None


def cannot_read(path: Path, error: Exception) -> MoepruneError:
    """Return the error of a file that the system does not let us read."""
    return MoepruneError(f"cannot read `{path}` ({getattr(error, 'strerror', None) or error})")
