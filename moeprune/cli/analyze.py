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
    Split,
)
from moeprune.output import Reporter, warn


def analyze(
    reporter: Reporter,
    checkpoint: Checkpoint,
    data: Annotated[
        str, typer.Option(help="Calibration data: digits, pairs, a .npz, a .safetensors, or a folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The analysis to write (.safetensors).")],
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
    reporter.check_outputs(output=output)
    from moeprune import calibration, report
    from moeprune.statistics import summarize

    runtime = runtime_for(device, dtype, batch_size, reporter.progress)
    loaded = load_model(checkpoint, model, preprocess)
    analysis = calibration.analyze(loaded, open_data(data, loaded, split, "calibration", limit), runtime)
    calibration.save_analysis(analysis, output)
    layers = {name: summarize(statistics) for name, statistics in analysis.layers.items()}
    for name, layer in layers.items():
        if layer["experts"] == 1:
            warn(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot even"
                " represent some simple convex functions, however large the expert is (Chung et al. 2024,"
                " Theorem 1): train with many small experts"
            )
    found = {
        "schema_version": 1,
        "checkpoint": str(checkpoint),
        "analysis": str(output),
        "data": analysis.provenance["data"],
        "layers": layers,
    }
    reporter.emit(found, report.analysis)
