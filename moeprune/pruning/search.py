"""Choosing among plans by measured data: the closest of a few, and the smallest within an accuracy drop.

A search for the smallest plan within a drop splits labelled data in two halves. On the first half, bisection
finds the smallest plan that keeps the limit. That plan and a few larger ones (`confirming_order`) are then
measured on the second half, from small to large, until one keeps the limit there too.

The list of plans is fixed before the second half is looked at, and so is the error level of each plan on it:
1 - confidence, divided by the number of plans. The probability that the bound of any plan on the list is
wrong is then at most 1 - confidence (Bonferroni's inequality). It does not matter that the choice depends on
the second half: the bound and the interval that are reported hold for whichever plan is chosen.

Testing from large to small at the full level until a plan fails (fixed-sequence testing) controls the error
as well. In simulations it found a plan slightly more often where samples were scarce and as small a one
elsewhere, but it measures more than twice as many plans, and it gives no bound for the chosen plan other than
the limit.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from moeprune.calibration.analysis import Analysis, analyze, require_analysis_of
from moeprune.calibration.sums import halves
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import compare, describe, predict
from moeprune.evaluation.gates import check_confidence, of_drop
from moeprune.evaluation.intervals import paired_difference, simultaneous_quantile
from moeprune.evaluation.results import Difference, Outcomes
from moeprune.files.checkpoint import tensor_infos
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import Method, Plan
from moeprune.pruning.apply import ALREADY_PRUNED, calibration_data, prune
from moeprune.pruning.budgets import flops_costs, plan_of_experts, plan_within, size_costs
from moeprune.pruning.compensation import is_affordable_refit
from moeprune.pruning.results import Confirmation, Search, TriedPlan

COMPARED_INPUTS = 1000
STEPS_OF_TWO = 2
"""Plans for each halving of what is kept or dropped."""
LEVEL = 0.95


@dataclass(frozen=True)
class DropLimit:
    """The largest accuracy drop, a fraction.

    confidence: in 0.5…1: the one-sided upper bound of the drop must be within the limit. None: the measured
        drop must be.
    """

    max_accuracy_drop: float
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_confidence(self.confidence)

    def judged(self, outcomes: Outcomes, plans: int = 1) -> float:
        """Return what is compared with the limit: the drop, or its bound.

        Args:
            plans: number of plans whose bounds hold all at once with the confidence.
        """
        if self.confidence is None:
            return outcomes.drop
        return of_drop(outcomes).bound(1 - (1 - self.confidence) / plans)

    def keeps(self, outcomes: Outcomes, plans: int = 1) -> bool:
        """Return whether outcomes are within the limit; plans as in `judged`."""
        return self.judged(outcomes, plans) <= self.max_accuracy_drop


@dataclass(frozen=True)
class Found:
    """A pruned model that a search found, and a report of the search."""

    model: Model
    report: Search


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
    """Prune by each of several plans and return the model that agrees with the full one on most inputs.

    Args:
        model: unpruned.
        plans: at least one.
        analysis: see moeprune.pruning.apply.prune, like one_shot and seed.
        data: calibration data, or its spec; the analysis's own if it is None.
        runtime: where and how models run.
    """
    if len(plans) > 1 and data is None:
        assert analysis is not None
        data = calibration_data(model, analysis)
    pruned = [
        prune(model, analysis, plan=plan, data=data, one_shot=one_shot, seed=seed, runtime=runtime)
        for plan in plans
    ]
    if len(pruned) == 1:
        return pruned[0]
    assert data is not None
    dataset = dataset_for(model, data, "calibration")
    differences = _differences(pruned, model, dataset.sample(COMPARED_INPUTS), runtime)
    return min(zip(differences, pruned, strict=True), key=lambda pair: pair[0])[1]


def _differences(
    models: Sequence[Model], full: Model, data: Dataset, runtime: Runtime
) -> list[tuple[int, float]]:
    """Return for each model how many predictions differ from the full one's, and the squared difference.

    Divergences would not do: by them, a model that is too sure of the right class is far from the full one.
    """
    device = runtime.torch_device
    full, *copies = (private_copy(model).to(device) for model in (full, *models))
    changed = torch.zeros(len(models), dtype=torch.int64)
    squares = torch.zeros(len(models), dtype=torch.float64)
    for index, found, expected in runtime.run_paired(dict(enumerate(copies)), full, data, "compare plans"):
        changed[index] += (found.argmax(-1) != expected.argmax(-1)).sum().cpu()
        squares[index] += (found - expected).square().sum().cpu()
    return list(zip(changed.tolist(), squares.tolist(), strict=True))


def prune_within_drop(
    model: Model,
    data: Dataset | str,
    limit: DropLimit,
    *,
    analysis: Analysis | None = None,
    method: Method = Method(),
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Found:
    """Return the smallest pruned model within an accuracy drop; unless scope is static, that of least FLOPs.

    Args:
        model: unpruned.
        data: labelled; a plan is searched on one half of it and confirmed on the other.
        limit: on the accuracy drop on both halves.
        analysis: of the model, made from other data, which everything is calibrated on; None: the half to
            search is calibrated on.
        method: of all plans.
        seed: of the signal `random`.
        runtime: where and how models run.

    Raises:
        MoepruneError: no plan is within the limit, the analysis was made from the same data, or what `prune`
            and `evaluate` raise.
    """
    require_dense_layers(model, ALREADY_PRUNED)
    data = dataset_for(model, data, "calibration")
    if data.samples < 2:
        raise MoepruneError(f"`{data.spec}` has one sample, a search needs at least two")
    first, second = (
        data.part(places.tolist(), name)
        for places, name in zip(halves(0, data.samples), ("half to search", "half to confirm"), strict=True)
    )
    if analysis is not None:
        require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
        _require_other_data(analysis, data, runtime)
    searching = _Half(model, first, runtime)
    calibration = first if analysis is None else calibration_data(model, analysis)
    analysis = analysis or analyze(model, first, runtime)
    apply = partial(prune, model, analysis, data=calibration, seed=seed, runtime=runtime)
    plans = _ladder(model, analysis, method)
    search = _Search(plans, lambda plan: apply(plan=plan), limit)
    index, pruned = search.smallest(searching)
    if pruned is not None:
        found = search.confirm(index, pruned, searching, _Half(model, second, runtime))
        if found is not None:
            return found
    raise search.failure(str(method), data.spec)


class _Half:
    """Half of the data, and the predictions of the full model on it."""

    def __init__(self, full: Model, data: Dataset, runtime: Runtime):
        self.data, self.runtime = data, runtime
        [self.predictions] = predict([full], data, runtime, "full model")
        self.figures = describe(full, self.predictions)

    def difference(self, pruned: Model, what: str) -> Difference:
        """Compare a pruned model with the full one; what: the title of the progress bar."""
        [predictions] = predict([pruned], self.data, self.runtime, what)
        return compare(describe(pruned, predictions), self.figures, predictions, self.predictions)


@dataclass
class _Search:
    """A search among plans, from small to large, that apply prunes by.

    judged: what was compared with the limit, for each plan that was measured; the larger of both halves.
    """

    plans: Sequence[Plan]
    apply: Callable[[Plan], Model]
    limit: DropLimit
    tried: dict[int, TriedPlan] = field(default_factory=dict)
    judged: dict[int, float] = field(default_factory=dict)

    def attempt(self, index: int, half: _Half) -> Model | None:
        """Return the pruned model if it is within the limit on the half to search."""
        pruned = self.apply(self.plans[index])
        difference = half.difference(pruned, f"try {len(self.tried) + 1}")
        self.tried[index] = TriedPlan(
            k={name: layer.k for name, layer in self.plans[index].items()},
            size=1 - difference.size_reduction,
            flops=1 - difference.flops_reduction,
            accuracy_drop=difference.accuracy_drop,
        )
        self.judged[index] = self.limit.judged(difference.outcomes)
        return pruned if self.limit.keeps(difference.outcomes) else None

    def smallest(self, half: _Half) -> tuple[int, Model | None]:
        """Return the smallest plan within the limit on the half to search, and its model if there is one."""
        models: list[Model] = []  # the last that was within the limit: the smallest

        def passes(index: int) -> bool:
            pruned = self.attempt(index, half)
            models[:] = models if pruned is None else [pruned]
            return pruned is not None

        index = bisect_left(range(len(self.plans)), True, key=passes)
        return index, models[0] if models else None

    def confirm(self, smallest: int, model: Model, first: _Half, second: _Half) -> Found | None:
        """Return the first plan, from the smallest on, that is within the limit on the second half too."""
        order = confirming_order(smallest, len(self.plans))
        for index in order:
            pruned = model if index == smallest else self.attempt(index, first)
            if pruned is None:
                continue
            difference = second.difference(pruned, "confirm")
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
                return Found(pruned, Search(max_accuracy_drop=limit, tried=tried, confirmed=confirmed))
        return None

    def failure(self, method: str, spec: str) -> MoepruneError:
        """Return the error that no plan of a method is within the limit."""
        if not self.plans:
            hint = "give another `--compensate` or `--scope`"
            return MoepruneError(f"no plan of {method} makes the model smaller", hint)
        what, confidence = "drop", self.limit.confidence
        if confidence is not None:
            what = f"upper bound, at confidence {confidence:g},"
        return MoepruneError(
            f"no plan of {method} is within an accuracy drop of {self.limit.max_accuracy_drop:g} on both"
            f" halves of `{spec}`; the least {what} on the worse half among {len(self.tried)} plans was"
            f" {min(self.judged.values()):.4g}",
            "allow a larger drop, give more samples, or compensate (`--compensate affine`)",
        )


def confirming_order(smallest: int, plans: int) -> list[int]:
    """Return the plans to measure on the second half, of which the smallest within the limit is known.

    They are 1, 2, 4, … steps larger than it, and the largest one.

    >>> confirming_order(5, 20)
    [5, 6, 7, 9, 13, 19]
    """
    steps = (2**power for power in range(plans.bit_length()))
    return sorted({smallest, plans - 1, *(smallest + step for step in steps if smallest + step < plans)})


def interval(outcomes: Outcomes, plans: int) -> tuple[float, float]:
    """Return the interval of a drop that, with those of so many plans, holds with probability LEVEL."""
    cells = outcomes.both, outcomes.lost, outcomes.won, outcomes.neither
    return paired_difference(*cells, simultaneous_quantile(LEVEL, plans))


def _require_other_data(analysis: Analysis, data: Dataset, runtime: Runtime) -> None:
    """Raise a MoepruneError if the analysis was made from any samples of the same source."""
    made_from = analysis.provenance["data"]
    is_same = _is_same_source(data.spec, made_from["spec"])
    if not is_same:
        for _ in data.batches(runtime.batch_size):
            pass  # the fingerprint is known behind it
        is_same = data.fingerprint == made_from["fingerprint"]
    if is_same:
        raise MoepruneError(
            f"the analysis was made from `{data.spec}` too: what confirms a drop must not be calibrated on",
            "leave `--analysis` out, so that the half that is searched is calibrated on, or give other"
            " labelled data",
        )


def _is_same_source(spec: str, other: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(spec).samefile(other)
    return spec == other


def _ladder(model: Model, analysis: Analysis, method: Method) -> list[Plan]:
    """Return plans from the smallest to nearly the full model, without those whose refit is not affordable.

    What is kept grows, or what is dropped shrinks, by about the same factor each time.
    """
    config = model.config
    is_static = method.scope == "static"
    if is_static:
        costs = size_costs(config, tensor_infos(model.state_dict()), method)
    else:
        costs = flops_costs(config, method)
    most = max(len(layer) - 1 for layer in costs.layers.values())
    plans: list[Plan] = []
    seen: set[tuple[int, ...]] = set()
    halvings = [2 ** (-step / STEPS_OF_TWO) for step in range(1, STEPS_OF_TWO * most.bit_length() + 1)]
    for share in sorted({*halvings, *(1 - part for part in halvings)}):
        experts = {name: max(1, round(share * (len(layer) - 1))) for name, layer in costs.layers.items()}
        if is_static:
            budget = costs.of(experts) / costs.full
            plan = plan_within(config, costs, budget, analysis, method, "keep")
        else:
            plan = plan_of_experts(config, experts, method)
        key = tuple(layer.k for layer in plan.values())
        is_affordable = all(
            is_affordable_refit(config.moe_layers[name], layer) for name, layer in plan.items()
        )
        if key not in seen and is_affordable and any(layer.drops for layer in plan.values()):
            seen.add(key)
            plans.append(plan)
    return plans
