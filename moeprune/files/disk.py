"""Files that are read only if they are regular, and written whole or not at all; no torch."""

import codecs
import contextlib
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from moeprune.errors import MoepruneError

logger = logging.getLogger(__name__)

MAX_LENGTH = 100_000_000  # bytes of the longest JSON that is read, as in the header of a safetensors file
temporaries: set[Path] = set()  # files and folders that are being written; Ctrl-C removes them


def require_file(path: Path, expected: str) -> None:
    """Raise a MoepruneError unless a path leads to a regular file with contents: a pipe may never end.

    expected: what the file should be, in words.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MoepruneError(f"no file `{path}`") from None
    except (OSError, ValueError) as error:
        raise refused("read", path, error) from None
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
    """Read a JSON file in UTF-8, which may begin with a byte order mark, or raise a MoepruneError.

    expected: what the file should be, in words.
    """
    require_file(path, expected)
    try:
        if path.stat().st_size > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} bytes")
        return msgspec.json.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise refused("read", path, error) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}` is not JSON ({error})", f"expected {expected}") from None


def write_file(path: str | Path, content: str | bytes, overwrite: bool = True) -> None:
    """Write a file, text in UTF-8; raise a MoepruneError if that fails or is not allowed."""
    with replacing(path, overwrite) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: str | Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the folder of a file, which becomes that file if nothing fails.

    Raises a MoepruneError if the file cannot be written, or exists and may not be replaced. A symbolic link is
    followed. Without `overwrite`, one of several concurrent writers succeeds.
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
        raise refused("write", path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        temporaries.discard(temporary)


@contextlib.contextmanager
def replacing_folder(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside a folder, which becomes that folder if nothing fails.

    Raises a MoepruneError if the folder cannot be written, or exists and may not be replaced.
    """
    target = check_output_folder(path, overwrite)
    temporary, old = (target.parent / f".{target.name[:48]}.{secrets.token_hex(8)}.{kind}" for kind in ("part", "old"))
    temporaries.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
        if os.path.lexists(target):
            target.rename(old)
        temporary.rename(target)
        logger.info(f"wrote `{path}`")
    except OSError as error:
        if old.exists() and not os.path.lexists(target):
            old.rename(target)
        raise refused("write", path, error) from None
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        temporaries.discard(temporary)


class ScratchFolder(tempfile.TemporaryDirectory):
    """A folder for temporary files, removed at the end, and by Ctrl-C, too."""

    def __init__(self) -> None:
        super().__init__(prefix="moeprune-")
        temporaries.add(Path(self.name))

    def cleanup(self) -> None:
        """Remove the folder."""
        super().cleanup()
        temporaries.discard(Path(self.name))


def check_output_folder(path: Path, overwrite: bool, source: Path | None = None) -> Path:
    """Return the folder that a path leads to; raise a MoepruneError if it cannot or may not be written.

    Only a folder that is empty or has a `config.json` is ever replaced. source: a folder that is read, which the other
    may not hold or be in.
    """
    try:
        target = Path(os.path.realpath(path))
        read = None if source is None else Path(os.path.realpath(source))
        if read is not None and (target == read or target in read.parents or read in target.parents):
            raise MoepruneError(f"`{path}` and `{source}`, which is read, overlap", "give another path")
        if os.path.lexists(target):
            if not target.is_dir():
                raise MoepruneError(f"`{path}` is a file, expected a folder to write")
            if not overwrite:
                raise _exists(path)
            if any(target.iterdir()) and not (target / "config.json").is_file():
                raise MoepruneError(f"`{path}` is not the folder of a model, and is not replaced", "give another path")
        if not target.parent.is_dir():
            raise MoepruneError(f"no directory `{target.parent}` for `{path}`", "create it first")
    except (OSError, ValueError) as error:
        raise refused("write", path, error) from None
    if not os.access(target.parent, os.W_OK):
        hint = "check its permissions, and whether its file system is read-only"
        raise MoepruneError(f"cannot write into `{target.parent}`", hint)
    return target


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
        raise refused("write", path, error) from None
    if not os.access(folder, os.W_OK):
        hint = "check its permissions, and whether its file system is read-only"
        raise MoepruneError(f"cannot write into `{folder}`", hint)
    return target


def refused(what: Literal["read", "write"], path: str | Path, error: Exception) -> MoepruneError:
    """Return the error of a file that the system does not let us read or write."""
    return MoepruneError(f"cannot {what} `{path}` ({getattr(error, 'strerror', None) or error})")


def _exists(path: str | Path) -> MoepruneError:
    return MoepruneError(f"`{path}` exists", "give another path, or `--force` to replace it")


def _publish_once(temporary: Path, target: Path) -> None:
    """Give a file its name, or raise a FileExistsError if that name is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        temporary.replace(target)
