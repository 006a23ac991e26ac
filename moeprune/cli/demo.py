"""`moeprune demo`."""

from __future__ import annotations

from moeprune.cli.reporter import Reporter
from moeprune.demo.request import DemoRequest
from moeprune.models.runtime import Runtime


def demo(reporter: Reporter, request: DemoRequest) -> None:
    """Analyze, prune and evaluate two shipped checkpoints.

    Runs on scikit-learn's digits, in under a minute on two cores.
    """
    from moeprune.demo.run import run_demo

    runtime = Runtime(request.device, batch_size=256, progress=not reporter.output.quiet)
    runtime.require_device()
    reporter.emit(run_demo(request.output, request.train, request.seed, runtime))
