"""`moeprune eval`."""

from __future__ import annotations

from pathlib import Path

from moeprune.cli.options import Report
from moeprune.cli.reporter import Reporter
from moeprune.pruning.request import SweepRequest


def eval(reporter: Reporter, request: SweepRequest, report: Report = None) -> int:
    """Report accuracy, size, FLOPs and latency, and judge them.

    Compares a checkpoint with the full model (--baseline); a gate that fails makes exit code 1. With --sweep
    or --plot, prunes a full model in many ways and evaluates each.
    """
    reporter.check_outputs(plot=request.plot, report=report)
    if request.is_sweep:
        return _sweep(reporter, request, report)
    from moeprune.evaluation.checkpoint import evaluate_checkpoint
    from moeprune.report import page

    found, model, analysis = evaluate_checkpoint(request)
    background = page.Background(model.plan, model.details.provenance, analysis, found.environment)
    reporter.emit_page(report, lambda: page.page_of(found, background))
    reporter.emit(found)
    return 0 if found.passed else 1


def _sweep(reporter: Reporter, request: SweepRequest, report: Path | None) -> int:
    from moeprune.pruning.checkpoint import sweep_checkpoint
    from moeprune.report import page
    from moeprune.report.trade_off import check_plot, plot_trade_off

    if request.plot is not None:
        check_plot(request.plot)
    found, model, analysis = sweep_checkpoint(request)
    if request.plot is not None:
        title = f"{request.checkpoint.path.name} on {found.data.spec} ({found.data.samples} samples)"
        plot_trade_off(found.rows, title, request.plot, reporter.output.force)
    background = page.Background({}, model.details.provenance, analysis, found.environment)
    reporter.emit_page(report, lambda: page.page_of(found, background))
    reporter.emit(found)
    return 0
