"""The command line. Torch is imported inside commands only: `--help` and usage errors answer at once."""

from moeprune.cli import commands
from moeprune.cli.command import app

__all__ = ["app", "commands"]
