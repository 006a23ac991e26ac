"""Choosing among plans by measured data: the closest of a few, and the smallest within an accuracy drop.

The search for the smallest splits labelled data in halves. On the first, bisection finds the smallest plan
within the limit; that plan and a few larger ones, of a list fixed by then (`confirming_order`), are measured
on the second, from small to large, until one is within the limit there too. Each of the K plans on the list
has the K-th part of the error level. By Bonferroni's inequality the bounds of all K then hold at once with
the confidence, so those of the chosen plan hold however it is chosen. (Testing from large to small, each at
the full level, until one fails finds a plan slightly more often, but measures twice as many, and gives no bound
below the limit.)
"""

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from moeprune.calibration.analysis import Analysis, analyze, class_names_of, require_analysis_of
from moeprune.calibration.sums import halves
from moeprune.data.datasets import Dataset
from moeprune.data.leakage import warn_of_seen_samples
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import Reference
from moeprune.evaluation.gates import check_confidence, of_drop
from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import Outcomes
from moeprune.files.checkpoint import tensor_infos
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import Method, Plan
from moeprune.pruning.apply import ALREADY_PRUNED, apply_plan, calibration_data
from moeprune.pruning.budgets import allocate, costs_of, losses
from moeprune.pruning.compensation import too_large_refits
from moeprune.pruning.results import Confirmation, Search, TriedPlan

COMPARED_INPUTS = 1000
STEPS_OF_TWO = 2  # plans for each halving of what is kept or dropped
LEVEL = 0.95


class DropLimit(NamedTuple):
    """The largest accuracy drop: of its measured value, or, with a confidence, of its one-sided bound."""

    max_accuracy_drop: float
    confidence: float | None = None

    def judged(self, outcomes: Outcomes, plans: int = 1) -> float:
        """Return the drop, or its bound at a level that lets the bounds of so many plans hold at once."""
        if self.confidence is None:
            return outcomes.drop
        return of_drop(outcomes).bound(1 - (1 - self.confidence) / plans)


def prune_best(
    model: Model,
    plans: Sequence[Plan],
    analysis: Analysis | None,
    *,
    data: Dataset | str | None = None,
    one_shot: bool = False,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Model:
    """Prune by each of one or more plans, and return the model that agrees with the full one on most inputs.

    The other arguments are those of apply_plan.
    """
    if data is not None:
        data = dataset_for(model, data, "calibration", class_names=class_names_of(analysis))
    elif len(plans) > 1:
        assert analysis is not None
        data = calibration_data(model, analysis)
    pruned = [
        apply_plan(model, plan, analysis, data=data, one_shot=one_shot, seed=seed, runtime=runtime) for plan in plans
    ]
    if len(plans) == 1 or data is None:
        return pruned[0]
    full, *copies = (private_copy(each).to(runtime.torch_device) for each in (model, *pruned))
    # Predictions that differ, and the squared difference. Divergences would not do: by them, a model that is too
    # sure of the right class is far from the full one.
    distances = torch.zeros(len(pruned), 2, dtype=torch.float64)
    pairs = runtime.run_paired(dict(enumerate(copies)), full, data.sample(COMPARED_INPUTS), "compare plans")
    for index, found, expected in pairs:
        distances[index, 0] += (found.argmax(-1) != expected.argmax(-1)).sum().cpu()
        distances[index, 1] += (found - expected).square().sum().cpu()
    return pruned[min(range(len(pruned)), key=lambda index: distances[index].tolist())]


def prune_within_drop(
    model: Model,
    data: Dataset | str,
    limit: DropLimit,
    *,
    analysis: Analysis | None = None,
    method: Method = Method(),
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
    plans = _ladder(model, analysis, method)
    if not plans:
        raise MoepruneError(f"no plan of {method} makes the model smaller", "give another method")
    apply = partial(apply_plan, model, analysis=analysis, data=calibration, seed=seed, runtime=runtime)
    search = _Search(plans, apply, limit, searching)
    if found := search.run(lambda: Reference(model, second, runtime, "full model")):
        return found
    bound = "" if limit.confidence is None else f" bound at confidence {limit.confidence:g}"
    raise MoepruneError(
        f"no plan of {method} is within an accuracy drop of {limit.max_accuracy_drop:g} on both halves of"
        f" `{data.spec}`; the least drop{bound} on the worse half among {len(search.judged)} plans was"
        f" {min(search.judged.values()):.4g}",
        "allow a larger drop, give more samples, or compensate (`--compensate affine`)",
    )


@dataclass
class _Search:
    """A search among plans, from small to large, that `apply` prunes by.

    judged: what was compared with the limit, for each plan that was measured; the larger of both halves.
    """

    plans: Sequence[Plan]
    apply: Callable[..., Model]
    limit: DropLimit
    first: Reference
    tried: dict[int, TriedPlan] = field(default_factory=dict)
    judged: dict[int, float] = field(default_factory=dict)
    within: Model | None = None

    def attempt(self, index: int) -> bool:
        """Return True if the model of a plan is within the limit on the first half; `within` is then that model."""
        pruned = self.apply(plan=self.plans[index])
        _, difference = self.first.compare(pruned, f"try {len(self.tried) + 1}")
        self.tried[index] = TriedPlan(
            k={name: layer.k for name, layer in self.plans[index].items()},
            size=1 - difference.size_reduction,
            flops=1 - difference.flops_reduction,
            accuracy_drop=difference.accuracy_drop,
        )
        self.judged[index] = self.limit.judged(difference.outcomes)
        is_within = self.judged[index] <= self.limit.max_accuracy_drop
        self.within = pruned if is_within else self.within
        return is_within

    def run(self, second_half: Callable[[], Reference]) -> tuple[Model, Search] | None:
        """Return the smallest model within the limit on both halves, and a report."""
        smallest = bisect_left(range(len(self.plans)), True, key=self.attempt)  # the last that is within the limit
        if self.within is None:
            return None
        second, order = second_half(), confirming_order(smallest, len(self.plans))
        for index in order:
            if index != smallest and not self.attempt(index):
                continue
            _, difference = second.compare(self.within, "confirm")
            judged = self.limit.judged(difference.outcomes, len(order))
            self.judged[index] = max(self.judged[index], judged)
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
                tried = [self.tried[index] for index in sorted(self.tried)]
                limit = self.limit.max_accuracy_drop
                return self.within, Search(max_accuracy_drop=limit, tried=tried, confirmed=confirmed)
        return None


def confirming_order(smallest: int, plans: int) -> list[int]:
    """Return the plans to confirm: the smallest, those 1, 2, 4, … steps larger, and the largest.

    >>> confirming_order(5, 20)
    [5, 6, 7, 9, 13, 19]
    """
    larger = (smallest + 2**power for power in range(plans.bit_length()))
    return sorted({smallest, plans - 1, *(plan for plan in larger if plan < plans)})


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


def _ladder(model: Model, analysis: Analysis, method: Method) -> list[Plan]:
    """Return plans from the smallest to nearly the full model, without those whose refit is not affordable.

    What is kept grows, or what is dropped shrinks, by about the same factor each time.
    """
    sizes = {name: layer.num_experts for name, layer in model.config.moe_layers.items()}
    if is_static := method.scope == "static":
        costs = costs_of(model.config, method, tensor_infos(model.state_dict()))
        lost = losses(analysis, method.compensate)
    plans: dict[tuple[int, ...], Plan] = {}
    steps = range(1, STEPS_OF_TWO * max(sizes.values()).bit_length() + 1)
    halvings = [2 ** (-step / STEPS_OF_TWO) for step in steps]
    for share in sorted({*halvings, *(1 - part for part in halvings)}):
        experts = {name: max(1, round(share * n)) for name, n in sizes.items()}
        if is_static:
            experts = allocate(lost, costs.layers, costs.of(experts) - costs.rest)
        plan = {name: method.plan(k, sizes[name]) for name, k in experts.items()}
        if not too_large_refits(model.config.moe_layers, plan) and any(layer.drops for layer in plan.values()):
            plans.setdefault(tuple(experts.values()), plan)
    return list(plans.values())
