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
from moeprune.errors import MoepruneError
from moeprune.files import write_text
from moeprune.output import Reporter, warn

NEEDS = {"oracle_samples": ("oracle",)}
"""See moeprune.cli.command.Rules."""


def analyze(
    reporter: Reporter,
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Calibration data: digits, pairs, a .npz, a .safetensors, or a folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The analysis to write (.safetensors).")],
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle/--no-oracle",
            show_default=False,
            help="On labelled data: also compare the experts that signals pick with the best subset.",
        ),
    ] = False,
    oracle_samples: Annotated[
        int | None, typer.Option(help="With --oracle: samples to compare.", min=1, show_default="256")
    ] = None,
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
        from moeprune.html import check_page

        check_page(report)
    if oracle_samples is not None and not oracle:
        raise MoepruneError("`--oracle-samples` goes with `--oracle`", "add `--oracle`")
    from moeprune import calibration, page
    from moeprune import report as reports
    from moeprune.evaluation import environment
    from moeprune.html import to_html
    from moeprune.oracle import SAMPLES, compare_signals, require_comparable
    from moeprune.plan import scopes_of
    from moeprune.statistics import summarize

    runtime = runtime_for(device, dtype, batch_size, reporter.progress)
    loaded = load_model(checkpoint, model, preprocess)
    dataset = open_data(data, loaded, split, "calibration", limit)
    if oracle:
        require_comparable(loaded, dataset)
    analysis = calibration.analyze(loaded, dataset, runtime)
    layers = {
        name: {**summarize(statistics), "scopes": scopes_of([loaded.config.soft_moe_layers[name]])}
        for name, statistics in analysis.layers.items()
    }
    for name, layer in layers.items():
        if layer["experts"] == 1:
            warn(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot even"
                " represent some simple convex functions, however large the expert is (Chung et al. 2024,"
                " Theorem 1): train with many small experts"
            )
    compared = None
    if oracle:
        compared = compare_signals(loaded, analysis, dataset, oracle_samples or SAMPLES, runtime)
    calibration.save_analysis(analysis, output)
    found = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "analysis": str(output),
        "data": analysis.provenance["data"],
        "layers": layers,
        "oracle": compared,
    }
    if report is not None:
        background = page.Background(
            provenance=loaded.details.provenance, analysis=analysis, environment=environment(runtime)
        )
        write_text(report, to_html(page.analysis(found, background)))
    reporter.emit(found, reports.analysis)
