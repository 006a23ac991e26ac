"""`moeprune export`."""

from __future__ import annotations

from moeprune.cli.reporter import Reporter
from moeprune.models.request import ExportRequest


def export(reporter: Reporter, request: ExportRequest) -> None:
    """Write a checkpoint for the library or the code that it came from.

    Takes unpruned models, and those pruned with scope static and compensation renorm. Verifies on random
    images that the library's model computes the same, if it is installed.
    """
    reporter.check_outputs(output=request.output)
    from moeprune.models import export
    from moeprune.models.opening import open_model

    model = open_model(request.checkpoint)
    reporter.emit(export.export(model, request.output, request.to, overwrite=reporter.output.force))
