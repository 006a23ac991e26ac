"""The entry point of `moeprune` and `python -m moeprune`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C exits with 130 from the first import on."""
    try:
        from moeprune.cli import app

        app(prog_name="moeprune")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
