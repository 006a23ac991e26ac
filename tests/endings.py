"""How a command may end: well, or with an error that a person can read, and in time."""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 300.0
"""Seconds for one command, a hundred times what it takes: they end what hangs, not what is slow on a busy machine."""


class TooSlowError(BaseException):
    """Not an Exception, which a command would turn into an exit code."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TooSlowError in the block once it has taken so long."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def files_under(folder: Path) -> dict[str, bytes | None]:
    """The bytes of all files under a folder; of what is none, None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(run: Callable[..., Any], words: Sequence[object], *named: str, folder: Path | None = None) -> str:
    """The error of a command that must be refused: it holds these texts, and the folder stays as it was."""
    before = folder and files_under(folder)
    result = run(*words)
    assert (result.code, result.stdout, result.stderr[:7]) == (2, "", "error: "), result
    assert [text for text in named if text not in result.stderr] == [], result.stderr
    assert "Traceback" not in result.stderr
    assert (folder and files_under(folder)) == before
    return result.stderr


def on_a_terminal(call: str, stream: str, columns: int = 120) -> str:
    """What a command writes to `stdout` or `stderr` where that is a terminal."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    streams = {"stdout": subprocess.DEVNULL} | {stream: terminal}
    process = subprocess.Popen([sys.executable, "-m", "moeprune", *call.split()], **streams)
    os.close(terminal)
    written = b""
    with contextlib.suppress(OSError):  # the end, where the terminal is closed
        while chunk := os.read(main, 4096):
            written += chunk
    os.close(main)
    assert process.wait() == 0
    return written.decode()


def check_none(complaints: Iterable[str | None]) -> None:
    """Fails with the first of what is wrong, if anything is."""
    found = [complaint for complaint in complaints if complaint]
    assert not found, "\n\n".join(found[:20]) + f"\n{len(found)} in all"


def complaint(run: Callable[..., Any], words: Sequence[object], folder: Path, *named: str) -> str | None:
    """What is wrong with how a command ends, if anything is.

    Good ends are exit code 0, 1 where a gate failed, and 2 with an error and with all files as they were.

    Args:
        run: the fixture.
        words: the command line.
        folder: where it may write.
        named: texts of which the error must hold one; given any, there must be an error.
    """
    before = files_under(folder)
    try:
        with time_limit(PATIENCE):
            result = run(*words)
    except TooSlowError:
        return "too slow"
    gate_failed = result.code == 1 and "FAILED" in result.stdout
    good = result.code == 2 or (not named and (result.code == 0 or gate_failed))
    if not good or "Traceback" in result.stderr or "a defect" in result.stderr:
        return f"exit code {result.code}: {result.stderr[-700:]}"
    after = files_under(folder)
    message = "\n".join(line for line in result.stderr.splitlines() if not line.startswith(("warning: ", "info: ")))
    if any(name.endswith(".part") for name in after):
        return f"left {sorted(after)}"
    if result.code != 2:
        if message:
            return f"says {message}"
        if "json" in words:
            try:
                json.loads(result.stdout, parse_constant=_refuse_constant)
            except ValueError as error:
                return f"no JSON: {error}"
        return None
    if before != after:
        return f"changed {sorted(before)} to {sorted(after)}"
    if result.stdout or not message.startswith(("error: ", "Error: ", "Usage: ")) or "out of memory" in message:
        return f"says {result.stdout[:300]} {message[:600]}"
    if named and not any(text in message for text in named):
        return f"does not name {' or '.join(named)}: {message[:600]}"
    return f"says too much: {message[:600]}" if len(message) > 20000 else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
