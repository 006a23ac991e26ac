"""Files written whole or not at all."""

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


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8.

    Raises:
        MoepruneError: the path cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file.

    Raises:
        MoepruneError: the path cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the target, renamed to it at the end, or removed if anything fails.

    Raises:
        MoepruneError: the path cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name[:48]}.{secrets.token_hex(8)}.part"
    temporaries.add(temporary)  # before it is there: a signal may come in between
    try:
        temporary.touch(0o600, exist_ok=False)
    except OSError as error:
        temporaries.discard(temporary)
        raise MoepruneError(f"cannot write `{path}` ({error.strerror})") from None
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        logger.info(f"wrote `{path}` ({path.stat().st_size} bytes)")
    except OSError as error:
        raise MoepruneError(f"cannot write `{path}` ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
        temporaries.discard(temporary)
