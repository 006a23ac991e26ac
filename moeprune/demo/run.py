"""Analyze, prune and evaluate the shipped checkpoints.

They are the `full.safetensors` that `moeprune demo --train -o DIR` writes into `DIR/single` and `DIR/vit`, and the
folder `DIR/language/full`.
"""

import contextlib
import importlib.util
from fractions import Fraction
from importlib import resources
from pathlib import Path

from msgspec.structs import replace

from moeprune.calibration.analysis import analyze, save_analysis
from moeprune.data.datasets import Dataset, open_data
from moeprune.demo.language import run_language, sources
from moeprune.demo.records import DemoModel, Summary
from moeprune.demo.train import pairs_recipe, single_layer_recipe, train
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import environment, evaluate
from moeprune.files.disk import write_file
from moeprune.models.model import Model, save
from moeprune.models.opening import load
from moeprune.models.runtime import Runtime
from moeprune.pruning.sweep import CONTROLS, Variant, sweep
from moeprune.records import to_text

MODELS = {
    "single": ("one Soft MoE layer of 128 experts, no residual", "digits", single_layer_recipe()),
    "vit": ("ViT with residuals, 3 Soft MoE layers of 64 experts", "pairs", pairs_recipe()),
}
"""Title, data and recipe of each model."""
METHODS = [
    ("static", "auto", "auto"), ("static", "gram", "renorm-refit"), ("static", "gram", "mean"),
    ("input", "combine", "none"), ("static", "random", "none"),
]  # fmt: skip
KEEPS = (Fraction(1, 32), Fraction(1, 16), Fraction(1, 8))
VARIANTS = [Variant(keep, *method) for method in METHODS for keep in KEEPS] + [
    Variant(0, "static", "combine", compensate) for compensate in CONTROLS
]
SAVED = {
    Variant(Fraction(1, 8), "static", "auto", "auto"),
    Variant(Fraction(1, 8), "static", "gram", "renorm-refit"),
    Variant(Fraction(1, 8), "input", "combine", "none"),
    Variant(0, "static", "combine", "linear"),
}
"""Variants whose checkpoints are written."""
CALIBRATION_INPUTS = 1000


def run_demo(directory: Path, train_anew: bool = False, seed: int = 0, runtime: Runtime = Runtime()) -> Summary:
    """Write checkpoints, analyses, evaluations and `summary.json` into a directory; whatever fails, it is as before.

    Args:
        train_anew: train all models first (minutes) instead of taking the shipped ones.
        seed: of training, and of random experts.
    """
    before = set(directory.rglob("*"))
    try:
        models = {name: _run_model(name, directory / name, train_anew, seed, runtime) for name in MODELS}
        language = None
        if importlib.util.find_spec("transformers") is None:
            runtime.step("language: left out, as transformers is missing (`pip install 'moeprune[hf]'`)")
        else:
            try:
                texts = sources()
            except MoepruneError as error:
                runtime.step(f"language: left out: {error.message}")
            else:
                language = run_language(texts, directory / "language", train_anew, seed, runtime)
        summary = Summary(directory=".", models=models, language=language, environment=environment(runtime))
        write_file(directory / "summary.json", to_text(summary))
    except BaseException:
        for path in sorted({directory, *directory.rglob("*")} - before, reverse=True):
            with contextlib.suppress(OSError):  # the directory itself may not be empty
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    return replace(summary, directory=str(directory))


def _run_model(name: str, directory: Path, train_anew: bool, seed: int, runtime: Runtime) -> DemoModel:
    title, data, recipe = MODELS[name]
    path = directory / "full.safetensors"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoepruneError(f"cannot write into `{directory}` ({error.strerror})") from None
    if train_anew:
        save(train(recipe, seed, runtime.progress), path, overwrite=True)
    else:
        write_file(path, (resources.files("moeprune.demo") / f"checkpoints/{name}.safetensors").read_bytes())
    full = load(path)
    calibration = open_data(data, full.input_format, "calibration", CALIBRATION_INPUTS)
    test = open_data(data, full.input_format, "test")
    analysis = analyze(full, calibration, runtime)
    save_analysis(analysis, directory / "analysis.safetensors", overwrite=True)
    _evaluate(path, full, test, runtime)
    rows = []
    results = sweep(full, VARIANTS, analysis, test, seed, runtime)
    for variant, (row, model) in zip([None, *VARIANTS], results, strict=True):
        rows.append(row)
        way = "full model" if variant is None else f"{variant.label}, {row.keep} kept"
        runtime.step(f"{name}: {way}: accuracy {100 * row.accuracy:.2f} %")
        if variant in SAVED:
            path = directory / f"{variant.scope}-{variant.compensate}-{row.keep.replace('/', '-')}.safetensors"
            save(model, path, overwrite=True)
            _evaluate(path, full, test, runtime)
    return DemoModel(title=title, data=test.info, rows=rows)


def _evaluate(path: Path, full: Model, test: Dataset, runtime: Runtime) -> None:
    result = replace(evaluate(load(path), test, full, runtime), checkpoint=path.name, baseline="full.safetensors")
    write_file(path.with_suffix(".json"), to_text(result))
