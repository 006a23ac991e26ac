"""Search for the smallest plan within an accuracy drop.

The search for the smallest splits labelled data in halves. On the first, bisection finds the smallest plan
within the limit; that plan and a few larger ones, of a list fixed by then (`confirming_order`), are measured
on the second, from small to large, until one is within the limit there too. Each of the K plans on the list
has the K-th part of the error level. By Bonferroni's inequality the bounds of all K then hold at once with
the confidence, so those of the chosen plan hold however it is chosen. (Testing from large to small, each at
the full level, until one fails finds a plan slightly more often, but measures twice as many, and gives no bound
below the limit.)
"""

import contextlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moeprune.calibration.analysis import Analysis, analyze, class_names_of, require_analysis_of
from moeprune.calibration.sums import halves
from moeprune.data.datasets import Dataset
from moeprune.data.leakage import warn_of_seen_samples
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import Reference, require_classes
from moeprune.evaluation.gates import check_confidence, of_drop
from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import Outcomes
from moeprune.files.checkpoint import tensor_infos
from moeprune.models.model import Model, dataset_for, fingerprint, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import Method, Plan, Wanted
from moeprune.pruning.apply import ALREADY_PRUNED, apply_plan, calibration_data
from moeprune.pruning.auto import methods
from moeprune.pruning.budgets import EMPTY, allocate, costs_of, losses
from moeprune.pruning.compensation import too_large_refits
from moeprune.pruning.results import Confirmation, Search, TriedPlan

STEPS_OF_TWO = 2  # plans for each halving of what is kept or dropped
FIRST_GROWTH = 0.02
RIVALS = 1.5  # times the cost of the smallest plan that is found: others up to that may be confirmed in its place
LEVEL = 0.95
ANYTHING = Wanted()


class DropLimit(NamedTuple):
    """The largest accuracy drop: of its measured value, or, with a confidence, of its one-sided bound."""

    max_accuracy_drop: float
    confidence: float | None = None

    def judged(self, outcomes: Outcomes, plans: int = 1) -> float:
        """Return the drop, or its bound at a level that lets the bounds of so many plans hold at once."""
        if self.confidence is None:
            return outcomes.drop
        return of_drop(outcomes).bound(1 - (1 - self.confidence) / plans)


def prune_within_drop(
    model: Model,
    data: Dataset | str,
    limit: DropLimit,
    *,
    analysis: Analysis | None = None,
    wanted: Wanted = ANYTHING,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> tuple[Model, Search]:
    """Return the smallest pruned model (or, unless scope is static, that of least FLOPs) within a drop.

    Args:
        data: labelled; a plan is searched on one half of it and confirmed on the other.
        limit: on the accuracy drop on both halves.
        analysis: made from other data, to calibrate on; None: the half to search is calibrated on.

    Raises a MoepruneError if no plan is within the limit, or the analysis was made from the same data.
    """
    check_confidence(limit.confidence)
    require_dense_layers(model, ALREADY_PRUNED)
    require_classes(model)
    data = dataset_for(model, data, "calibration", class_names=class_names_of(analysis))
    warn_of_seen_samples(data, None)
    if data.samples < 2:
        raise MoepruneError(f"`{data.spec}` has one sample, a search needs at least two")
    places = [half.tolist() for half in halves(0, data.samples)]
    first, second = data.part(places[0], "half to search"), data.part(places[1], "half to confirm")
    if analysis is not None:
        require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
        _require_other_data(analysis, data, runtime)
    searching = Reference(model, first, runtime, "full model")
    calibration = first if analysis is None else calibration_data(model, analysis)
    analysis = analysis or analyze(model, first, runtime)
    ways = methods(wanted, model.config.moe_layers, has_data=True, one_shot=False, is_budget=True)
    ladders = [ladder for way in ways if (ladder := _ladder(model, analysis, way))]
    if not ladders:
        raise MoepruneError("no plan makes the model smaller", "give another `--compensate`")
    apply = partial(apply_plan, model, analysis=analysis, data=calibration, seed=seed, runtime=runtime)
    search = _Search(apply, limit, searching)
    ladders.sort(key=lambda ladder: ladder[0].cost)
    if found := search.run(ladders, lambda: Reference(model, second, runtime, "full model")):
        return found
    bound = "" if limit.confidence is None else f" bound at confidence {limit.confidence:g}"
    raise MoepruneError(
        f"no plan is within an accuracy drop of {limit.max_accuracy_drop:g} on both halves of"
        f" `{data.spec}`; the least drop{bound} on the worse half among {len(search.tried)} plans was"
        f" {min(each.judged for each in search.tried):.4g}",
        "allow a larger drop, give more samples, or compensate otherwise (`--compensate`)",
    )


class Step(NamedTuple):
    """A plan of a ladder, and the share of the full model that it leaves."""

    plan: Plan
    cost: float


@dataclass
class _Tried:
    """A plan that was measured; judged: what was compared with the limit, the larger of both halves."""

    step: Step
    figures: TriedPlan
    judged: float


@dataclass
class _Search:
    """A search among plans that `apply` prunes by."""

    apply: Callable[..., Model]
    limit: DropLimit
    first: Reference
    tried: list[_Tried] = field(default_factory=list)
    within: Model | None = None

    def attempt(self, step: Step) -> bool:
        """Return True if the model of a plan is within the limit on the first half; `within` is then that model."""
        self.tried = [each for each in self.tried if each.step is not step]  # measured again, to be confirmed
        pruned = self.apply(plan=step.plan)
        _, difference = self.first.compare(pruned, f"try {len(self.tried) + 1}")
        first = next(iter(step.plan.values()))
        figures = TriedPlan(
            compensate=first.compensation,
            rank=first.rank,
            k={name: layer.k for name, layer in step.plan.items()},
            size=1 - difference.size_reduction,
            flops=1 - difference.flops_reduction,
            accuracy_drop=difference.accuracy_drop,
        )
        self.tried.append(_Tried(step, figures, self.limit.judged(difference.outcomes)))
        is_within = self.tried[-1].judged <= self.limit.max_accuracy_drop
        self.within = pruned if is_within else self.within
        return is_within

    def climb(self, ladders: Sequence[Sequence[Step]]) -> list[Step]:
        """Return the smallest plan of each ladder that is within the limit on the first half, and what is larger on it.

        They are sorted by cost. Plans that cost RIVALS times as much as one of another ladder are not tried.
        """
        found: list[Step] = []
        for ladder in ladders:
            least = min((step.cost for step in found if len(ladder) > 1), default=math.inf)
            cheaper = [step for step in ladder if step.cost < RIVALS * least]
            place = bisect_left(cheaper, True, key=self.attempt)
            found += ladder[place:] if place < len(cheaper) else []
        return sorted(found, key=lambda step: step.cost)

    def run(
        self, ladders: Sequence[Sequence[Step]], second_half: Callable[[], Reference]
    ) -> tuple[Model, Search] | None:
        """Return the smallest model within the limit on both halves, and a report."""
        steps = self.climb(ladders)
        if not steps:
            return None
        second, order = second_half(), confirming_order([step.cost for step in steps])
        for index in order:
            if not (self.tried[-1].step is steps[index] and self.within is not None) and not self.attempt(steps[index]):
                continue
            assert self.within is not None
            _, difference = second.compare(self.within, "confirm")
            judged = self.limit.judged(difference.outcomes, len(order))
            self.tried[-1].judged = max(self.tried[-1].judged, judged)
            if judged <= self.limit.max_accuracy_drop:
                confirmed = Confirmation(
                    samples=second.data.samples,
                    plans=len(order),
                    accuracy_drop=difference.accuracy_drop,
                    accuracy_drop_ci95=interval(difference.outcomes, len(order)),
                    mcnemar_p=difference.mcnemar_p,
                    confidence=self.limit.confidence,
                    bound=None if self.limit.confidence is None else judged,
                )
                tried = [each.figures for each in sorted(self.tried, key=lambda each: each.step.cost)]
                return self.within, Search(self.limit.max_accuracy_drop, tried, confirmed)
        return None


def confirming_order(costs: Sequence[float]) -> list[int]:
    """Return which of several plans, from small to large by cost, to confirm.

    The smallest, the first that costs 2 % more, of the rest the first that costs 4 % more than that, then 8 %, and so
    on; and the largest.

    >>> confirming_order([1.0, 1.01, 1.03, 1.05, 1.08, 1.5, 1.9])
    [0, 2, 4, 5, 6]
    """
    order, growth = [0], FIRST_GROWTH
    for index, cost in enumerate(costs):
        if cost >= costs[order[-1]] * (1 + growth):
            order.append(index)
            growth *= 2
    return sorted({*order, len(costs) - 1})


def interval(outcomes: Outcomes, plans: int) -> tuple[float, float]:
    """Return the interval of a drop that, with those of so many plans, holds with probability LEVEL."""
    return paired_difference(*outcomes.cells, simultaneous_quantile(LEVEL, plans))


def _require_other_data(analysis: Analysis, data: Dataset, runtime: Runtime) -> None:
    """Raise a MoepruneError if the analysis was made from any samples of the same source."""
    made_from = analysis.origin.data
    is_same = data.spec == made_from.spec and data.spec[:1] != "<"  # samples in memory have names that are not unique
    with contextlib.suppress(OSError, ValueError):
        is_same = is_same or Path(data.spec).samefile(made_from.spec)
    if not is_same:
        is_same = data.read_fingerprint(runtime.batch_size) == made_from.fingerprint
    if is_same:
        raise MoepruneError(
            f"the analysis was made from `{data.spec}` too: what confirms a drop must not be calibrated on",
            "leave `--analysis` out, to calibrate on the half to search, or give other labelled data",
        )


def _ladder(model: Model, analysis: Analysis, method: Method) -> list[Step]:
    """Return plans from the smallest to nearly the full model, without those whose refit is not affordable.

    What is kept grows, or what is dropped shrinks, by about the same factor each time. Costs are bytes with scope
    `static`, else FLOPs; plans that are no cheaper than the full model are left out.
    """
    layers = model.config.moe_layers
    sizes = {name: layer.num_experts for name, layer in layers.items()}
    is_static = method.scope == "static"
    costs = costs_of(model.config, method, tensor_infos(model.state_dict()) if is_static else None)
    lost = losses(analysis, method.compensate) if is_static else {}
    plans: dict[tuple[int, ...], Step] = {}
    steps = range(1, STEPS_OF_TWO * max(sizes.values()).bit_length() + 1)
    halvings = [2 ** (-step / STEPS_OF_TWO) for step in steps]
    shares = [0.0] * (method.compensate in EMPTY and is_static and method.width is None)
    shares += [] if method.compensate == "linear" else sorted({*halvings, *(1 - part for part in halvings)})
    for share in shares:
        experts = {name: max(1, round(share * n)) if share else 0 for name, n in sizes.items()}
        if is_static and share:
            experts = allocate(lost, costs.layers, costs.of(experts) - costs.rest)
        plan = {name: method.plan_of(layers[name], name, k) for name, k in experts.items()}
        cost = costs.of(experts) / costs.full
        drops = any(layer.drops or layer.width for layer in plan.values())
        if drops and (cost < 1 or method.mass is not None) and not too_large_refits(layers, plan):
            plans.setdefault(tuple(experts.values()), Step(plan, cost))
    return sorted(plans.values(), key=lambda step: step.cost)
