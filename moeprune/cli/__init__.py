"""The command line: a file for each command.

Torch is imported inside commands only: `--help` and usage errors answer at once.
"""

from moeprune.cli.analyze import analyze
from moeprune.cli.command import app, with_exit_code
from moeprune.cli.convert import convert
from moeprune.cli.demo import demo
from moeprune.cli.eval import eval
from moeprune.cli.inspect import inspect
from moeprune.cli.prune import prune

for command in (inspect, analyze, prune, eval, convert, demo):
    app.command(command.__name__)(with_exit_code(command))

__all__ = ["app"]
