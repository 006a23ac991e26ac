"""`moeprune analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.opening import load_model, open_data, runtime_for
from moeprune.cli.options import (
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Factory,
    Limit,
    Preprocess,
    Report,
    Split,
)
from moeprune.cli.reporter import Reporter, warn
from moeprune.files.writing import write_text


def analyze(
    reporter: Reporter,
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Calibration data: digits, pairs, a .npz, a .safetensors, or a folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The analysis to write (.safetensors).")],
    report: Report = None,
    model: Factory = None,
    split: Split = None,
    preprocess: Preprocess = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 64,
) -> None:
    """Measure what each expert matters to each input.

    Runs calibration data through an unpruned checkpoint, once.
    """
    reporter.check_outputs(output=output, report=report)
    if report is not None:
        from moeprune.report.html import check_page

        check_page(report)
    from moeprune.calibration import analysis as calibration
    from moeprune.calibration.results import AnalysisReport
    from moeprune.calibration.statistics import summarize
    from moeprune.evaluation.evaluate import environment
    from moeprune.plan import scopes_of
    from moeprune.report import commands as reports
    from moeprune.report import page
    from moeprune.report.html import to_html

    runtime = runtime_for(device, dtype, batch_size, not reporter.quiet)
    loaded = load_model(checkpoint, model, preprocess)
    dataset = open_data(data, loaded, split, "calibration", limit)
    analysis = calibration.analyze(loaded, dataset, runtime)
    layers = {
        name: summarize(statistics, scopes_of([loaded.config.moe_layers[name]]))
        for name, statistics in analysis.layers.items()
    }
    for name, layer in layers.items():
        if layer.experts == 1:
            warn(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot even"
                " represent some simple convex functions, however large the expert is (Chung et al. 2024,"
                " Theorem 1): train with many small experts"
            )
    calibration.save_analysis(analysis, output, reporter.force)
    found = AnalysisReport(checkpoint=str(checkpoint), analysis=str(output), data=dataset.info, layers=layers)
    if report is not None:
        background = page.Background(
            provenance=loaded.details.provenance, analysis=analysis, environment=environment(runtime)
        )
        write_text(report, to_html(page.analysis(found, background)), reporter.force)
    reporter.emit(found, reports.analysis)
