"""`moeprune analyze`."""

from __future__ import annotations

from moeprune.calibration.request import AnalyzeRequest
from moeprune.cli.options import Report
from moeprune.cli.reporter import Reporter


def analyze(reporter: Reporter, request: AnalyzeRequest, report: Report = None) -> None:
    """Measure how much each expert matters to each input.

    Runs calibration data through an unpruned checkpoint, once.
    """
    reporter.check_outputs(output=request.output, report=report)
    from moeprune.calibration.checkpoint import analyze_checkpoint
    from moeprune.evaluation.evaluate import environment
    from moeprune.report import page

    found, model, analysis = analyze_checkpoint(request)
    background = page.Background(
        provenance=model.details.provenance, analysis=analysis, environment=environment(request.runtime)
    )
    reporter.emit_page(report, lambda: page.page_of(found, background))
    reporter.emit(found)
