"""`moeprune prune`."""

from __future__ import annotations

from moeprune.cli.reporter import Reporter
from moeprune.pruning.request import PruneRequest


def prune(reporter: Reporter, request: PruneRequest) -> None:
    """Write a checkpoint that runs fewer experts.

    How many is set by one of --keep, --mass, --max-size, --max-flops, --max-accuracy-drop and --plan.
    """
    reporter.check_outputs(output=request.output, save_plan=request.save_plan)
    from moeprune.pruning.checkpoint import prune_checkpoint

    reporter.emit(prune_checkpoint(request))
