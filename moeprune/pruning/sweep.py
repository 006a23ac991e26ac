"""Many ways to prune one model, each evaluated on the same data, beside the controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

from tqdm import tqdm

from moeprune.calibration.analysis import Analysis
from moeprune.data.datasets import Dataset
from moeprune.evaluation.evaluate import Predictions, compare, describe, predict
from moeprune.evaluation.latency import measure_latency
from moeprune.evaluation.results import Latency, ModelFigures
from moeprune.models.model import Model, require_moe_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import COMPENSATIONS, LayerPlan, experts_to_keep, is_possible
from moeprune.pruning.apply import calibration_data, prune
from moeprune.pruning.compensation import is_affordable_refit
from moeprune.pruning.results import SweepRow

RANDOM_DRAWS = 10
COMPENSATIONS_TRIED = tuple(name for name in COMPENSATIONS if name != "merge")
"""In a sweep that is not told which."""


@dataclass(frozen=True)
class Variant:
    """One way to prune a model; keep is a share of the experts, or 0 for none at all."""

    keep: Fraction | int
    scope: str
    signal: str
    compensate: str


def grid(
    keeps: Iterable[Fraction | int],
    scopes: Iterable[str],
    signals: Iterable[str],
    compensations: Iterable[str],
    control_scope: str = "static",
) -> Iterator[Variant]:
    """All combinations, with the controls of each share: `random` under every compensation, one set
    for all inputs. The last ones keep no expert at all.

    Args:
        control_scope: of the controls; `static` where the model can be pruned so.
    """
    scopes, signals, compensations = list(scopes), list(signals), list(compensations)
    controlled = [c for c in compensations if is_possible(control_scope, "random", c)]
    for keep in keeps:
        for scope, signal, compensate in product(scopes, signals, compensations):
            if signal != "random" and is_possible(scope, signal, compensate):
                yield Variant(keep, scope, signal, compensate)
        for compensate in controlled:
            yield Variant(keep, control_scope, "random", compensate)
    for compensate in controlled:
        if compensate not in ("renorm", "refit", "merge"):  # these make something of kept experts
            yield Variant(0, control_scope, "combine", compensate)


def without_large_refits(variants: Iterable[Variant], model: Model) -> tuple[list[Variant], list[Variant]]:
    """The variants, and apart from them those whose `refit` would take too many regressors."""
    possible: list[Variant] = []
    left_out: list[Variant] = []
    for variant in variants:
        is_affordable = True
        for name, layer in model.config.moe_layers.items():
            k = experts_to_keep(variant.keep, layer.num_experts, name, "--sweep")
            plan = LayerPlan(variant.scope, k, layer.num_experts, variant.signal, variant.compensate)
            is_affordable &= is_affordable_refit(layer, plan)
        (possible if is_affordable else left_out).append(variant)
    return possible, left_out


def sweep(
    model: Model,
    variants: Iterable[Variant],
    analysis: Analysis,
    data: Dataset,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    latency_batches: Sequence[int] | None = None,
) -> Iterator[tuple[SweepRow, Model]]:
    """Prune the model in each way and evaluate it on labelled data, one after the other.

    Args:
        model: unpruned.
        variants: what to try.
        analysis: of the model; its data is read again to measure layers behind pruned ones.
        data: what the results are evaluated on.
        seed: of the signal `random`, which is drawn RANDOM_DRAWS times with seeds from this on.
        runtime: where and how models run.
        latency_batches: batch sizes at which latency is measured too, in turn with the full model's; None:
            it is not.

    Yields:
        A row, without label and frontier, and the model that it is about: first the full one, then one for
        each variant (the last of its draws).
    """
    todo = list(variants)
    for variant, (name, layer) in product(todo, require_moe_layers(model).items()):
        experts_to_keep(variant.keep, layer.config.num_experts, name, "--sweep")
    calibration = calibration_data(model, analysis)
    [full] = predict([model], data, runtime)
    described = describe(model, full)

    def latency(pruned: Model) -> Latency | None:
        if latency_batches is None:
            return None
        return measure_latency(pruned, data, model, latency_batches, runtime)

    yield _row(None, [(described, full)], described, full, latency(model)), model
    for variant in tqdm(todo, desc="sweep", unit=" variants", disable=None if runtime.progress else True):
        results = []
        for draw in range(RANDOM_DRAWS if variant.signal == "random" else 1):
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
        yield _row(variant, results, described, full, latency(pruned)), pruned


def _row(
    variant: Variant | None,
    results: list[tuple[ModelFigures, Predictions]],
    full: ModelFigures,
    full_predictions: Predictions,
    latency: Latency | None,
) -> SweepRow:
    accuracies = [described.accuracy for described, _ in results]
    differences = [compare(described, full, found, full_predictions) for described, found in results]
    accuracy = statistics.fmean(accuracies)
    return SweepRow(
        label=None,
        keep="1" if variant is None else str(variant.keep),
        scope=None if variant is None else variant.scope,
        signal=None if variant is None else variant.signal,
        compensate=None if variant is None else variant.compensate,
        accuracy=accuracy,
        accuracy_sd=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        retained=accuracy / full.accuracy if full.accuracy else None,
        agreement=statistics.fmean(difference.agreement for difference in differences),
        draws=len(results),
        model=results[-1][0],
        difference=differences[-1],
        latency=latency,
        on_frontier=None,
    )
