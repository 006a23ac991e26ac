"""Many ways to prune one model, each evaluated on the same data, with random experts as a control."""

import logging
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from moeprune.amounts import keep_to_text
from moeprune.calibration.analysis import Analysis
from moeprune.data.datasets import Dataset
from moeprune.data.leakage import warn_of_seen_samples
from moeprune.evaluation.evaluate import Reference, require_classes
from moeprune.evaluation.latency import measure_latency
from moeprune.evaluation.results import Difference, ModelFigures
from moeprune.layers.interface import LayerConfig
from moeprune.models.model import Model, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import COMPENSATIONS, REFITS, Plan, Wanted, is_possible, refusal, uniform_plan
from moeprune.pruning.apply import ALREADY_PRUNED, apply_plan, calibration_data
from moeprune.pruning.auto import affordable, choose, half
from moeprune.pruning.auto import methods as ways_of
from moeprune.pruning.results import OnFrontier, SweepRow

logger = logging.getLogger(__name__)
RANDOM_DRAWS = 10
CONTROLS = ("none", "affine", "linear")  # compensations without any expert
COMPENSATIONS_TRIED = tuple(name for name in COMPENSATIONS if name not in ("linear", "merge"))  # in a grid by default
Keeps = Sequence[Fraction | int]
KEEPS = tuple(Fraction(1, 2**power) for power in range(6, 0, -1))
METHODS = {
    ("static", "auto", "auto"): "auto",
    ("static", "gram", "renorm-refit"): "drop-in: static, renorm-refit",
    ("static", "gram", "mean"): "static by gram, mean",
    ("static", "gram", "affine"): "static by gram, affine",
    ("input", "deviation", "affine"): "input by deviation, affine",
    ("input", "combine", "none"): "paper's rule: input, none",
    ("static", "combine", "none"): "static by combine, none",
    ("static", "random", "none"): "random: static, none",
}
"""Methods that a sweep compares by default, by scope, signal and compensation, and their labels."""
LINEAR = "no MoE at all: linear"


class Variant(NamedTuple):
    """One way to prune a model, some of it perhaps `auto`; keep is a share of the experts, or 0 for none at all."""

    keep: Fraction | int
    scope: str
    signal: str
    compensate: str

    @property
    def label(self) -> str:
        """The name of the method in plots and tables."""
        if self.compensate == "linear":
            return LINEAR
        return METHODS.get(self[1:], f"{self.scope} by {self.signal}, {self.compensate}")

    def plans(self, layers: Mapping[str, LayerConfig]) -> list[Plan]:
        """Return the plans of a model with these layers that it stands for."""
        wanted = Wanted(*self[1:])  # type: ignore[arg-type]
        ways = ways_of(wanted, layers, has_data=True, one_shot=False)
        return affordable([uniform_plan(layers, self.keep, method, "--sweep") for method in ways], layers)


def grid(
    keeps: Keeps, scopes: Iterable[str], signals: Iterable[str], compensations: Sequence[str], control_scope: str
) -> Iterator[Variant]:
    """Yield all possible combinations, and as controls (of this scope) random experts and none at all."""
    every = product(scopes, signals, [each for each in compensations if each != "linear"])
    ways = [way for way in every if way[1] != "random" and is_possible(*way)]
    controls = [c for c in compensations if c not in ("auto", "linear") and is_possible(control_scope, "random", c)]
    ways += [(control_scope, "random", compensate) for compensate in controls]
    yield from (Variant(keep, *way) for keep in keeps for way in ways)
    for compensate in controls:
        if compensate not in (*REFITS, "renorm", "merge"):  # these use kept experts
            yield Variant(0, control_scope, "combine", compensate)
    if "linear" in compensations:
        yield Variant(0, "static", "combine", "linear")


def possible_ways(ways: Sequence[Variant], layers: Mapping[str, LayerConfig]) -> list[Variant]:
    """Return the ways in which layers can be pruned; warn of those that are left out for the number of experts."""
    reasons = {way: next(filter(None, (refusal(plan, layers) for plan in way.plans(layers))), None) for way in ways}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        left_out = [f"{way.label} at {way.keep}" for way in ways if reasons[way] == reason]
        logger.warning(f"left out: {', '.join(left_out)}: {reason}")
    return [way for way in ways if reasons[way] is None]


def methods(keeps: Keeps, layers: Mapping[str, LayerConfig]) -> Iterator[Variant]:
    """Yield each of METHODS that all layers can do, at each share; and CONTROLS."""

    def can(scope: str, compensate: str) -> bool:
        return all(scope in layer.scopes and compensate in ("auto", *layer.compensations) for layer in layers.values())

    for keep in keeps:
        for scope, signal, compensate in METHODS:
            if can(scope, compensate):
                yield Variant(keep, scope, signal, compensate)
    for compensate in CONTROLS:
        if can("static", compensate):
            yield Variant(0, "static", "combine", compensate)


def sweep(
    model: Model,
    variants: Iterable[Variant],
    analysis: Analysis,
    data: Dataset,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    latency_batches: Sequence[int] | None = None,
    repeat: int | None = None,
) -> Iterator[tuple[SweepRow, Model]]:
    """Prune the model in each way and evaluate it on labelled data, one after the other.

    Yields a row, without its place on the frontier, and its model: first the full one, then one for each variant (the
    last of its draws).

    Args:
        analysis: of the unpruned model; its data is read again to measure layers behind pruned ones.
        seed: of the signal `random`, which is drawn RANDOM_DRAWS times with seeds from this on.
        latency_batches: batch sizes at which latency is measured; None: it is not.
        repeat: prune each variant on so many random halves of the calibration data; None: once, on all of it.
    """
    require_dense_layers(model, ALREADY_PRUNED)
    require_classes(model)
    plans = [(variant, variant.plans(model.config.moe_layers)) for variant in variants]
    calibration = calibration_data(model, analysis)
    reference = Reference(model, data, runtime, "full model")
    warn_of_seen_samples(data, analysis.origin.data)

    def row(
        variant: Variant | None, plan: Plan, results: list[tuple[ModelFigures, Difference]], pruned: Model
    ) -> SweepRow:
        accuracies = [figures.accuracy for figures, _ in results]
        mean, of_full = statistics.fmean(accuracies), reference.figures.accuracy
        latency = None if latency_batches is None else measure_latency(pruned, data, model, latency_batches, runtime)
        first = next(iter(plan.values()), None)
        return SweepRow(
            label=None if variant is None else variant.label,
            scope=None if first is None else first.scope,
            signal=None if first is None else first.signal,
            compensate=None if first is None else first.compensation,
            rank=None if first is None else first.rank,
            keep="1.0" if variant is None else keep_to_text(variant.keep),
            accuracy=mean,
            accuracy_sd=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            retained=mean / of_full if of_full else None,
            agreement=statistics.fmean(difference.agreement for _, difference in results),
            draws=len(results),
            model=results[-1][0],
            difference=results[-1][1],
            latency=latency,
            on_frontier=None,
        )

    yield row(None, {}, [reference.itself], model), model
    for variant, possible in runtime.bar("sweep", "variants", plans):
        results, (plan, _) = [], choose(model, possible, calibration, seed, runtime)
        for draw in range(repeat or (RANDOM_DRAWS if variant.signal == "random" else 1)):
            used = calibration if repeat is None else half(calibration, seed + draw)
            known = analysis if repeat is None else None
            pruned = apply_plan(model, plan, known, data=used, seed=seed + draw, runtime=runtime)
            results.append(reference.compare(pruned))
        yield row(variant, plan, results, pruned), pruned


def on_frontier(rows: Sequence[SweepRow]) -> list[OnFrontier]:
    """Return for each row whether no other is as accurate at less cost, or more accurate at no more."""

    def is_best(row: SweepRow, which: str) -> bool:
        own = (getattr(row, which), -row.accuracy)
        others = ((getattr(other, which), -other.accuracy) for other in rows)
        return not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in others)

    return [OnFrontier(**{which: is_best(row, which) for which in OnFrontier.__struct_fields__}) for row in rows]
