"""The entry point of `moeprune` and `python -m moeprune`."""

import contextlib
import os
import shutil
import signal
import sys
from typing import Any


def main() -> None:
    """Run the command line; Ctrl-C exits with 130 from the first import on, SIGTERM with 143."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _exit_at_once)
    if sys.stderr is None:  # it was closed
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stderr.write("error: stdout is closed\n\nhint: send it to a file, or to /dev/null\n")
        sys.exit(2)
    from moeprune.cli import app

    try:
        app(prog_name="moeprune")
    except OSError as error:  # of --help and --version
        sys.stdout = None  # else it is tried again in the end
        sys.stderr.write(f"error: cannot write to stdout ({error.strerror})\n")
        sys.exit(2)


def _exit_at_once(signal_number: int, _: Any) -> None:
    """Libraries swallow a KeyboardInterrupt while they are imported, or make an ImportError of it."""
    for path in tuple(getattr(sys.modules.get("moeprune.files.disk"), "temporaries", ())):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    os._exit(128 + signal_number)


if __name__ == "__main__":
    main()
