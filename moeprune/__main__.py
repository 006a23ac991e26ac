"""The entry point of `moeprune` and `python -m moeprune`."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Run the command line; Ctrl-C exits with 130 from the first import on."""
    signal.signal(signal.SIGINT, _exit_at_once)
    from moeprune.cli import app

    app(prog_name="moeprune")


def _exit_at_once(*_: Any) -> None:
    """Libraries swallow a KeyboardInterrupt while they are imported, or make an ImportError of it."""
    for path in tuple(getattr(sys.modules.get("moeprune.checkpoint"), "temporaries", ())):
        path.unlink(missing_ok=True)
    os._exit(130)


if __name__ == "__main__":
    main()
