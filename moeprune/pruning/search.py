"""The smallest pruned model whose accuracy drop is within a limit, searched and confirmed on labelled data.

The data is split in two by a hash of the samples' places. On one part plans from small to large are tried,
halving the range each time; on the other, which no choice has seen, the result is confirmed, and where it
is not, larger ones are tried until one is. What is reported is the confirmed drop; its interval is so wide
that it holds for all plans that were measured there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch

from moeprune.calibration.analysis import Analysis, analyze, require_analysis_of
from moeprune.calibration.sums import halves
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import compare, describe, paired_counts, predict
from moeprune.evaluation.intervals import mcnemar, paired_difference
from moeprune.files.checkpoint import tensor_infos
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import Plan
from moeprune.pruning.apply import ALREADY_PRUNED, calibration_data, prune
from moeprune.pruning.budgets import flops_costs, plan_of_experts, plan_within, size_costs
from moeprune.pruning.compensation import is_affordable_refit
from moeprune.pruning.results import Confirmation, Search, TriedPlan

COMPARED_INPUTS = 1000
STEPS_OF_TWO = 2
"""Plans for each halving of what is kept or dropped."""
LEVEL = 0.95


@dataclass(frozen=True)
class Found:
    """The model that a search found, and how.

    model: pruned. report: plans tried on the part that was searched, and the drop confirmed on the other.
    """

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
    """The pruned model that predicts as the full model does for most inputs, of several plans.

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
    """How far each model's output is from the full one's: predictions that differ, then squared differences.

    Divergences will not do: a model that is too sure of the right class is far away by them.
    """
    device = runtime.torch_device
    full, *copies = (private_copy(model).to(device) for model in (full, *models))
    changed = torch.zeros(len(models), dtype=torch.int64)
    squares = torch.zeros(len(models), dtype=torch.float64)
    for index, found, expected in runtime.beside(dict(enumerate(copies)), full, data, "compare plans"):
        changed[index] += (found.argmax(-1) != expected.argmax(-1)).sum().cpu()
        squares[index] += (found - expected).square().sum().cpu()
    return list(zip(changed.tolist(), squares.tolist(), strict=True))


def prune_within_drop(
    model: Model,
    data: Dataset | str,
    max_accuracy_drop: float,
    *,
    analysis: Analysis | None = None,
    scope: str = "static",
    signal: str = "combine",
    compensate: str = "none",
    energy: float | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Found:
    """The smallest pruned model within a drop of accuracy; with scope `input` or `batch` that of least FLOPs.

    Args:
        model: unpruned.
        data: labelled; half of it confirms what is found on the other half.
        max_accuracy_drop: a fraction.
        analysis: of the model, whose own data, other than this, everything is calibrated on; None: the half
            of the data that is searched serves for that.
        scope: see moeprune.pruning.apply.prune, like signal, compensate, energy and seed.
        runtime: where and how models run.

    Raises:
        MoepruneError: no plan is within the drop, the analysis was made from the same data, or what `prune`
            and `evaluate` raise.
    """
    require_dense_layers(model, ALREADY_PRUNED)
    data = dataset_for(model, data, "calibration")
    if data.samples < 2:
        raise MoepruneError(f"`{data.spec}` has one sample, a search needs two at least")
    searched, confirming = (
        data.part(members.tolist(), name)
        for members, name in zip(halves(0, data.samples), ("half to search", "half to confirm"), strict=True)
    )
    if analysis is not None:
        require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
        _require_other_data(analysis, data, runtime)
    [full_searched] = predict([model], searched, runtime, "full model")
    if analysis is None:
        calibration, analysis = searched, analyze(model, searched, runtime)
    else:
        calibration = calibration_data(model, analysis)
    described = describe(model, full_searched)
    plans = _ladder(model, analysis, scope, signal, compensate, energy)
    tried: dict[int, TriedPlan] = {}

    def attempt(index: int) -> Model | None:
        """The pruned model, if it is within the drop on the part that is searched."""
        pruned = prune(model, analysis, plan=plans[index], data=calibration, seed=seed, runtime=runtime)
        [predictions] = predict([pruned], searched, runtime, f"try {len(tried) + 1}")
        difference = compare(describe(pruned, predictions), described, predictions, full_searched)
        tried[index] = TriedPlan(
            k={name: layer.k for name, layer in plans[index].items()},
            size=1 - difference.size_reduction,
            flops=1 - difference.flops_reduction,
            accuracy_drop=difference.accuracy_drop,
        )
        return pruned if difference.accuracy_drop <= max_accuracy_drop else None

    # The first plan that passes is in low…high; behind the last one would be the full model.
    low, high = 0, len(plans)
    smallest: Model | None = None
    while low < high:
        middle = (low + high) // 2
        pruned = attempt(middle)
        if pruned is not None:
            high, smallest = middle, pruned
        else:
            low = middle + 1
    [full_confirming] = predict([model], confirming, runtime, "full model")
    drops = {index: entry.accuracy_drop for index, entry in tried.items()}  # on the worse half
    measured = 0
    for index in range(high, len(plans)):
        pruned = smallest if index == high else attempt(index)
        drops[index] = tried[index].accuracy_drop
        if pruned is None:
            continue
        [predictions] = predict([pruned], confirming, runtime, "confirm")
        measured += 1
        counts = _, lost, won, _ = paired_counts(predictions, full_confirming)
        drop = (lost - won) / sum(counts)
        drops[index] = max(drops[index], drop)
        if drop <= max_accuracy_drop:
            quantile = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / measured)
            confirmed = Confirmation(
                samples=confirming.samples,
                plans=measured,
                accuracy_drop=drop,
                accuracy_drop_ci95=paired_difference(*counts, quantile),
                mcnemar_p=mcnemar(lost, won),
            )
            report = Search(
                max_accuracy_drop=max_accuracy_drop,
                tried=[tried[i] for i in sorted(tried)],
                confirmed=confirmed,
            )
            return Found(pruned, report)
    if not tried:
        raise MoepruneError(
            f"no plan of scope {scope} and compensation {compensate} makes the model smaller",
            "give another `--compensate` or `--scope`",
        )
    raise MoepruneError(
        f"no plan of scope {scope} and compensation {compensate} is within an accuracy drop of"
        f" {max_accuracy_drop:g} on both halves of `{data.spec}`; the least drop on the worse half among"
        f" {len(tried)} plans was {min(drops.values()):.4g}",
        "allow a larger drop, or compensate (`--compensate affine`)",
    )


def _require_other_data(analysis: Analysis, data: Dataset, runtime: Runtime) -> None:
    """Raise a MoepruneError if the half that confirms may have been calibrated on: if the data is the same,
    however many of its samples.
    """
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


def _ladder(
    model: Model, analysis: Analysis, scope: str, signal: str, compensate: str, energy: float | None
) -> list[Plan]:
    """Plans from the smallest to nearly the full model: what is kept grows, or what is dropped shrinks, by
    about the same factor each time. Those whose refit is not affordable are left out.
    """
    config = model.config
    if scope == "static":
        costs = size_costs(config, tensor_infos(model.state_dict()), scope, signal, compensate)
    else:
        costs = flops_costs(config, scope, signal, compensate)
    most = max(len(layer) - 1 for layer in costs.layers.values())
    plans: list[Plan] = []
    seen: set[tuple[int, ...]] = set()
    halvings = [2 ** (-step / STEPS_OF_TWO) for step in range(1, STEPS_OF_TWO * most.bit_length() + 1)]
    for share in sorted({*halvings, *(1 - part for part in halvings)}):
        experts = {name: max(1, round(share * (len(layer) - 1))) for name, layer in costs.layers.items()}
        if scope == "static":
            budget = costs.of(experts) / costs.full
            plan = plan_within(
                config,
                costs,
                budget,
                analysis,
                scope=scope,
                signal=signal,
                compensation=compensate,
                energy=energy,
                option="keep",
            )
        else:
            plan = plan_of_experts(config, experts, scope, signal, compensate, energy)
        key = tuple(layer.k for layer in plan.values())
        is_affordable = all(
            is_affordable_refit(config.moe_layers[name], layer) for name, layer in plan.items()
        )
        if key not in seen and is_affordable and any(layer.drops for layer in plan.values()):
            seen.add(key)
            plans.append(plan)
    return plans
