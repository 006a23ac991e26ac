"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moeprune.errors import MoepruneError

logger = logging.getLogger(__name__)

temporaries: set[Path] = set()
"""Files that are being written; Ctrl-C removes them."""


def write_text(path: str | Path, text: str, overwrite: bool = True) -> None:
    """Write a text file in UTF-8; raise a MoepruneError if that fails or is not allowed."""
    write_bytes(path, text.encode(), overwrite)


def write_bytes(path: str | Path, data: bytes, overwrite: bool = True) -> None:
    """Write a file; raise a MoepruneError if that fails or is not allowed."""
    with replacing(path, overwrite) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of a file, which becomes that file if nothing fails.

    Args:
        path: the file to write. A symbolic link is followed.
        overwrite: replace a file that exists. Otherwise one of several concurrent writers succeeds.

    Raises:
        MoepruneError: the file cannot be written, or exists and may not be replaced; the disk is full.
    """
    target = check_output(path, overwrite)
    temporary = target.parent / f".{target.name[:48]}.{secrets.token_hex(8)}.part"
    temporaries.add(temporary)  # before the file exists: a signal may arrive in between
    try:
        temporary.touch(0o600, exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if overwrite:
            temporary.replace(target)
        else:
            _publish_once(temporary, target)
        logger.info(f"wrote `{path}` ({target.stat().st_size} bytes)")
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        temporaries.discard(temporary)


def check_output(path: str | Path, overwrite: bool) -> Path:
    """Return the file that a path leads to; raise a MoepruneError if it cannot or may not be written."""
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        if os.path.lexists(target) and not target.is_file():
            kind = "a directory" if target.is_dir() else "not a regular file"
            raise MoepruneError(f"`{path}` is {kind}, expected a file to write")
        if target.is_file() and not overwrite:
            raise _exists(path)
        folder = target.parent if path.is_symlink() else path.parent
        if not folder.is_dir():
            raise MoepruneError(f"no directory `{folder}` for `{path}`", "create it first")
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from None
    if not os.access(folder, os.W_OK):
        hint = "check its permissions, and whether its file system is read-only"
        raise MoepruneError(f"cannot write into `{folder}`", hint)
    return target


def _publish_once(temporary: Path, target: Path) -> None:
    """Give a file its name, or raise a FileExistsError if that name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(target)


def _exists(path: str | Path) -> MoepruneError:
    return MoepruneError(f"`{path}` exists", "give another path, or `--force` to replace it")


def _cannot_write(path: str | Path, error: Exception) -> MoepruneError:
    return MoepruneError(f"cannot write `{path}` ({getattr(error, 'strerror', None) or error})")
