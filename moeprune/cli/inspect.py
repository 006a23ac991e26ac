"""`moeprune inspect`."""

from __future__ import annotations

from moeprune.cli.reporter import Reporter
from moeprune.models.request import InspectRequest


def inspect(reporter: Reporter, request: InspectRequest) -> None:
    """Show the contents of a checkpoint.

    Layers, experts, parameters, size, FLOPs, plan and provenance.
    """
    from moeprune.models.inspection import inspect_checkpoint

    reporter.emit(inspect_checkpoint(request.checkpoint))
