"""Analyze, prune and evaluate the two shipped checkpoints in several ways, and compare.

`moeprune/demo/checkpoints/single.safetensors` and `vit.safetensors` are the `full.safetensors` that
`moeprune demo --train -o DIR` writes into `DIR/single` and `DIR/vit`.
"""

from __future__ import annotations

from fractions import Fraction
from importlib import resources
from pathlib import Path

import msgspec

from moeprune.calibration.analysis import analyze, save_analysis
from moeprune.data.datasets import Dataset, open_data
from moeprune.demo.results import DemoModel, Summary
from moeprune.demo.train import pairs_recipe, single_layer_recipe, train
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import environment, evaluate
from moeprune.files.writing import write_bytes, write_text
from moeprune.models.model import Model, save
from moeprune.models.opening import load
from moeprune.models.runtime import Runtime
from moeprune.pruning.sweep import Variant, sweep
from moeprune.records import to_text

MODELS = {
    "single": ("one Soft MoE layer of 128 experts, no residual", "digits", single_layer_recipe),
    "vit": ("ViT with residuals, 3 Soft MoE layers of 64 experts", "pairs", pairs_recipe),
}
METHODS = {
    "the paper's rule: input, none": ("input", "combine", "none"),
    "random experts: static, none": ("static", "random", "none"),
    "input, mean": ("input", "combine", "mean"),
    "static, none": ("static", "combine", "none"),
    "static, mean": ("static", "combine", "mean"),
    "static, lstsq": ("static", "combine", "lstsq"),
    "static by gram, affine": ("static", "gram", "affine"),
}
CALIBRATION_INPUTS = 1000
KEEPS = (Fraction(1, 32), Fraction(1, 16), Fraction(1, 8))
NO_EXPERTS = {
    f"no experts at all: {compensate}": Variant(0, "static", "combine", compensate)
    for compensate in ("none", "mean", "lstsq", "affine")
}
FILES = {
    Variant(Fraction(1, 8), "input", "combine", "none"): "input-none-1-8.safetensors",
    Variant(Fraction(1, 16), "input", "combine", "mean"): "input-mean-1-16.safetensors",
    Variant(Fraction(1, 8), "static", "combine", "lstsq"): "static-lstsq-1-8.safetensors",
    Variant(Fraction(1, 16), "static", "combine", "lstsq"): "static-lstsq-1-16.safetensors",
    Variant(Fraction(1, 32), "static", "gram", "affine"): "static-affine-1-32.safetensors",
}


def run_demo(
    directory: Path, train_anew: bool = False, seed: int = 0, runtime: Runtime = Runtime()
) -> Summary:
    """Write checkpoints, analyses and evaluations into the directory, and `summary.json`.

    Args:
        train_anew: train both models first (minutes) instead of taking the shipped ones.

    Returns:
        What `summary.json` holds.

    Raises:
        MoepruneError: the directory cannot be written, or scikit-learn is missing.
    """
    models = {name: _run_model(name, directory / name, train_anew, seed, runtime) for name in MODELS}
    summary = Summary(models=models, environment=environment(runtime))
    write_text(directory / "summary.json", to_text(summary))
    return summary


def _run_model(name: str, directory: Path, train_anew: bool, seed: int, runtime: Runtime) -> DemoModel:
    title, data_name, recipe = MODELS[name]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoepruneError(f"cannot write into `{directory}` ({error.strerror})") from None
    if train_anew:
        save(train(recipe(), seed, runtime.progress), directory / "full.safetensors")
    else:
        shipped = resources.files("moeprune.demo") / "checkpoints" / f"{name}.safetensors"
        write_bytes(directory / "full.safetensors", shipped.read_bytes())
    full = load(directory / "full.safetensors")
    calibration = open_data(data_name, full.input_format, "calibration", CALIBRATION_INPUTS)
    test = open_data(data_name, full.input_format, "test")
    analysis = analyze(full, calibration, runtime)
    save_analysis(analysis, directory / "analysis.safetensors")
    labels: dict[Variant | None, str] = {None: "full model"}
    labels |= {Variant(keep, *method): label for label, method in METHODS.items() for keep in KEEPS}
    labels |= {variant: label for label, variant in NO_EXPERTS.items()}
    variants = [variant for variant in labels if variant is not None]
    _evaluate(directory / "full.safetensors", full, test, runtime)
    rows = []
    results = sweep(full, variants, analysis, test, seed, runtime)
    for (variant, label), (row, model) in zip(labels.items(), results, strict=True):
        rows.append(msgspec.structs.replace(row, label=label))
        if variant in FILES:
            save(model, directory / FILES[variant])
            _evaluate(directory / FILES[variant], full, test, runtime)
    return DemoModel(title=title, data=test.info, rows=rows)


def _evaluate(path: Path, full: Model, test: Dataset, runtime: Runtime) -> None:
    """Evaluate a checkpoint and write the result beside it."""
    result = evaluate(load(path), test, full, runtime)
    result = msgspec.structs.replace(result, checkpoint=path.name, baseline="full.safetensors")
    write_text(path.with_suffix(".json"), to_text(result))
