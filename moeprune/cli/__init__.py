"""The command line: a file for each command.

Torch is imported inside commands only: `--help` and usage errors answer at once.
"""

from moeprune.cli import analyze, demo, eval, export, inspect, prune, schema
from moeprune.cli.command import add_command, app

add_command(inspect.inspect)
add_command(analyze.analyze)
add_command(prune.prune)
add_command(eval.eval)
add_command(export.export)
add_command(demo.demo)
add_command(schema.schema)

__all__ = ["app"]
