"""Many ways to prune one model, each evaluated on the same data, beside the controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import product
from typing import Any

from tqdm import tqdm

from moeprune.calibration import Analysis
from moeprune.data import Dataset
from moeprune.evaluation import Predictions, compare, describe, predict
from moeprune.model import SoftMoEViT
from moeprune.pruning import calibration_data, prune
from moeprune.runtime import Runtime

RANDOM_DRAWS = 10


@dataclass(frozen=True)
class Variant:
    """One way to prune a model; keep is a share of the experts, or 0 for none at all."""

    keep: Fraction | int
    scope: str
    signal: str
    compensate: str

    def to_json(self) -> dict[str, str]:
        """As JSON values."""
        return {**asdict(self), "keep": str(self.keep)}


def grid(
    keeps: Iterable[Fraction | int],
    scopes: Iterable[str],
    signals: Iterable[str],
    compensations: Iterable[str],
) -> Iterator[Variant]:
    """All combinations, with the controls of each share: `random` under every compensation, one set
    for all inputs. The last ones keep no expert at all.
    """
    scopes, signals, compensations = list(scopes), list(signals), list(compensations)
    for keep in keeps:
        for scope, signal, compensate in product(scopes, signals, compensations):
            if signal != "random":
                yield Variant(keep, scope, signal, compensate)
        for compensate in compensations:
            yield Variant(keep, "static", "random", compensate)
    for compensate in compensations:
        if compensate != "renorm":
            yield Variant(0, "static", "combine", compensate)


def sweep(
    model: SoftMoEViT,
    variants: Iterable[Variant],
    analysis: Analysis,
    data: Dataset,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> list[dict[str, Any]]:
    """Prune the model in each way and evaluate it on labelled data.

    Args:
        analysis: of the model; its data is read again to measure layers behind pruned ones.
        data: what the results are evaluated on.
        seed: of the signal `random`, which is drawn RANDOM_DRAWS times with seeds from this on.

    Returns:
        A row of JSON values for the full model and one for each variant: `keep`, `scope`, `signal`,
        `compensate`, `accuracy` and `agreement` (means over the draws), `accuracy_sd` (over the
        draws; None for one), `retained` (accuracy as a share of the full model's), and the figures of
        moeprune.evaluation.evaluate for the last draw.
    """
    calibration = calibration_data(model, analysis)
    [full] = predict([model], data, runtime)
    described = describe(model, full)
    rows = [
        _row(
            {"keep": "1", "scope": None, "signal": None, "compensate": None},
            [(described, full)],
            described,
            full,
        )
    ]
    todo = list(variants)
    for variant in tqdm(todo, desc="sweep", unit="variant", disable=None if runtime.progress else True):
        draws = RANDOM_DRAWS if variant.signal == "random" else 1
        results = []
        for draw in range(draws):
            pruned = prune(
                model,
                analysis,
                keep=variant.keep,
                scope=variant.scope,
                signal=variant.signal,
                compensate=variant.compensate,
                data=calibration,
                seed=seed + draw,
                runtime=runtime,
            )
            [predictions] = predict([pruned], data, runtime)
            results.append((describe(pruned, predictions), predictions))
        rows.append(_row(variant.to_json(), results, described, full))
    return rows


def _row(
    variant: dict[str, str | None],
    results: list[tuple[dict[str, Any], Predictions]],
    full: dict[str, Any],
    full_predictions: Predictions,
) -> dict[str, Any]:
    accuracies = [described["accuracy"] for described, _ in results]
    differences = [compare(described, full, found, full_predictions) for described, found in results]
    accuracy = statistics.fmean(accuracies)
    return {
        **variant,
        "accuracy": accuracy,
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "retained": accuracy / full["accuracy"] if full["accuracy"] else None,
        "agreement": statistics.fmean(difference["agreement"] for difference in differences),
        "draws": len(results),
        "model": results[-1][0],
        "difference": differences[-1],
    }
