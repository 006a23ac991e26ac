"""The command line: a file for each command.

Torch is imported inside commands only: `--help` and usage errors answer at once.
"""

from moeprune.cli import analyze, config, convert, demo, eval, inspect, prune
from moeprune.cli.command import add_command, app

add_command(inspect.inspect)
add_command(analyze.analyze)
add_command(prune.prune, prune.DISPLACES, prune.NEEDS)
add_command(eval.eval, eval.DISPLACES, eval.NEEDS)
add_command(convert.convert, convert.DISPLACES, convert.NEEDS)
add_command(demo.demo)
add_command(config.config)

__all__ = ["app"]
