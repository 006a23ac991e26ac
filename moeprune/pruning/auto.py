"""Choose among ways to prune by what they do to a model's predictions on held-out calibration inputs.

All candidates are fitted from the same sums: one pass of the full model over three quarters of the calibration inputs,
which waits at each layer until every candidate has pruned it. Then all of them, and the full model, predict the last
quarter. The distance of two predictions is the total variation of their probabilities (half the sum of absolute
differences), which bounds how often they disagree; without a head, the change of the features as a share of their
square. Of the candidates that are surely nearly as near as the nearest one (within SAME, with the standard error of the
difference), the cheapest wins; those that cost more than the full model are not tried. Labels are not used.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from moeprune.calibration.changes import changes
from moeprune.calibration.sums import halves
from moeprune.calibration.together import run_paired
from moeprune.calibration.walk import Walk
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.layers.interface import LayerConfig
from moeprune.models.folders.costs import PrunedBytes
from moeprune.models.folders.form import form_of
from moeprune.models.language import LanguageModel
from moeprune.models.model import Model, private_copy
from moeprune.models.runtime import Runtime, by_rows
from moeprune.plan import (
    LOW_RANK,
    RANK,
    REFITS,
    WITH_RANK,
    Compensation,
    LayerPlan,
    Method,
    Plan,
    Scope,
    Wanted,
    is_possible,
    refusal,
)
from moeprune.pruning.apply import Pruning, apply_plan
from moeprune.pruning.compensation import too_large_refits
from moeprune.pruning.results import SAME, Candidate, Repeats

logger = logging.getLogger(__name__)
MOST_INPUTS, FEWEST_INPUTS = 2048, 192  # that candidates are compared on; a quarter of them held out
TRIAL_FLOPS = 1e12  # of these inputs' forward pass, within these numbers
FEWEST_TOKENS, MOST_TOKENS = 1 << 14, 1 << 17  # of text that candidates are compared on
MOST_LAYERS = 8  # of a language model that are pruned for it
MOST_REGRESSORS = 1500  # of refits that `auto` tries: beyond, `low-rank` does better at less cost
FEWEST = 8  # inputs for a comparison; with fewer, dropped experts give their means
RANKS = (0.25, 0.5, 1, 2, 4, 8)  # of LOW_RANK, with a stated number of experts
TRIED_RANKS = (1, 3, 4)  # those of them that are tried, counted from the largest that costs less than the full model
RANKS_OF_BUDGETS = (0.25, 1, 2, 4, 8, 16)
WIDTHS_OF_BUDGETS = ("1/2", "1/4")  # shares of the hidden units that more experts can be had for
TRIED_STATIC: tuple[Compensation, ...] = ("mean", "lstsq", "affine", "refit", "renorm-refit", *LOW_RANK)
TRIED_ROUTED: tuple[Compensation, ...] = ("mean", "lstsq", "affine", *LOW_RANK)


def methods(
    wanted: Wanted, layers: Mapping[str, LayerConfig], has_data: bool, one_shot: bool, is_budget: bool = False
) -> list[Method]:
    """Return the ways to prune that `auto` stands for; one if nothing is left open.

    has_data: there is calibration data, or an analysis of it. one_shot: it cannot be read again, for fits. is_budget:
    the number of experts is open, so that `linear` and more ranks are possible.

    Raises a MoepruneError if what is left open needs calibration and there is none, or nothing is possible.
    """
    if wanted.scope == "auto":
        wanted = wanted.replace(scope=possible_scope(wanted, layers))
    scope = wanted.concrete_scope
    if wanted.energy is not None and wanted.compensate in LOW_RANK and is_budget:
        hint = "give `--rank`, or `--keep` in place of the budget"
        raise MoepruneError(f"`--energy` with `--compensate {wanted.compensate}` leaves open what a plan costs", hint)
    if wanted.compensate != "auto":
        return [_method(wanted, wanted.compensate, rank, has_data) for rank in _ranks(wanted, layers)]
    if not has_data:
        raise MoepruneError(
            "choosing how to compensate (`--compensate auto`, the default) needs calibration data",
            "add `--data`, or `--analysis` where no data is read; without data only `--compensate none` is possible,"
            " with `--scope input --signal combine` (the paper's rule) or `--signal random`",
        )
    found = []
    tried: Sequence[Compensation] = ("mean",) if one_shot else TRIED_STATIC if scope == "static" else TRIED_ROUTED
    has_linear = is_budget and scope == "static" and not one_shot and wanted.width is None
    for compensation in (*tried, *(("linear",) if has_linear else ())):
        each = wanted.replace(compensate=compensation)
        is_allowed = all(compensation in layer.compensations for layer in layers.values())
        if is_allowed and is_possible(scope, each.signal_for(compensation), compensation):
            ranks = _ranks(each, layers, RANKS_OF_BUDGETS if is_budget else RANKS)
            found += [_method(each, compensation, rank) for rank in ranks[::-1]]  # lower ones take their maps from it
    if wanted.energy is not None:
        found = [method for method in found if method.compensate in WITH_RANK]
    if not found and wanted.energy is not None:
        raise MoepruneError("`--energy` needs a fit, and data to fit to", "leave it out")
    if not found:
        raise MoepruneError(f"no compensation goes with signal `{wanted.signal}` here", "give `--compensate`")
    return found


def without_dropping(wanted: Wanted, layers: Mapping[str, LayerConfig], is_fitted: bool) -> list[Method]:
    """Return the ways to drop hidden units of all experts, if no expert is dropped; is_fitted: data can be read."""
    tried = ["none", *(["renorm-refit"] if is_fitted else [])]
    possible = [name for name in tried if all(name in layer.compensations for layer in layers.values())]
    return [_method(wanted, name, None) for name in possible]


def narrower(layers: Mapping[str, LayerConfig]) -> list[Method]:
    """Return ways to meet a budget with more, but narrower experts, if all layers have such."""
    for layer in layers.values():
        if "static" not in layer.scopes or not layer.hidden_units or "renorm-refit" not in layer.compensations:
            return []
    return [Method("static", "gram", "renorm-refit", width=width) for width in WIDTHS_OF_BUDGETS]


def possible_scope(wanted: Wanted, layers: Mapping[str, LayerConfig]) -> Scope:
    """Return the scope that `auto` stands for: `input` where layers cannot be pruned statically."""
    scope = wanted.concrete_scope
    return scope if all(scope in layer.scopes for layer in layers.values()) else "input"


def _method(wanted: Wanted, compensation: str, rank: int | float | None, has_data: bool = True) -> Method:
    signal: Any = wanted.signal_for(compensation, has_data)
    scope, compensate = wanted.concrete_scope, cast("Compensation", compensation)
    return Method(scope, signal, compensate, wanted.mass, wanted.energy, rank, wanted.width)


def _ranks(
    wanted: Wanted, layers: Mapping[str, LayerConfig], ranks: Sequence[int | float] = (RANK,)
) -> list[int | float | None]:
    """Return the ranks to try: at most half the width of an expert, with as many weights as half of an expert."""
    if wanted.compensate not in LOW_RANK or wanted.rank is not None or wanted.energy is not None:
        return [wanted.rank]
    most = max(1, min(min(layer.dim, layer.output_width, layer.expert_width // 2) for layer in layers.values()))
    is_static = wanted.concrete_scope == "static"
    return [*dict.fromkeys(min(rank, most) for rank in ranks if is_static or rank >= 1)]


def affordable(plans: Sequence[Plan], layers: Mapping[str, LayerConfig]) -> list[Plan]:
    """Return the plans that layers can be pruned by and whose refits are not too large, or the first one; of several,
    also not too costly.
    """
    most = dict.fromkeys(REFITS, MOST_REGRESSORS) if len(plans) > 1 else {}
    possible = [plan for plan in plans if not refusal(plan, layers)]
    return [plan for plan in possible if not too_large_refits(layers, plan, most)] or [*(possible or plans)[:1]]


def choose(
    model: Model, plans: Sequence[Plan], data: Dataset, seed: int, runtime: Runtime
) -> tuple[Plan, list[Candidate]]:
    """Return the best of several plans, which may leave their experts open, and what was tried, as it was given.

    data: calibration data. seed: of the signal `random`.
    """
    if len(plans) == 1 or not any(layer.drops or layer.width for plan in plans for layer in plan.values()):
        return plans[0], []
    if data.samples < FEWEST:
        logger.warning(
            f"{data.samples} samples are too few to compare ways to prune: the simplest is taken; give {FEWEST} or more"
        )
        simplest = [plan for plan in plans if all(layer.compensation == "mean" for layer in plan.values())]
        return (simplest or [*plans])[0], []
    if len(plans := _cheaper(model, plans)) == 1:
        return plans[0], []
    inputs, names = _trial(model, plans, data)
    fitted_on, held_out = split(data.sample(inputs))
    full = private_copy(model).to(runtime.torch_device)
    models = fit_all(full, [{name: plan[name] for name in names} for plan in plans], fitted_on, seed, runtime)
    distances = compare(models, full, held_out, runtime)
    costs = [_shares(plan, each, full) for plan, each in zip(plans, models, strict=True)]
    best = select(distances, [sum(cost) for cost in costs], SAME * len(names) / len(plans[0]))
    candidates = []
    for index, (plan, (size, flops)) in enumerate(zip(plans, costs, strict=True)):
        first = next(iter(plan.values()))
        candidates.append(
            Candidate(
                scope=first.scope,
                signal=first.signal,
                compensate=first.compensation,
                rank=first.rank,
                k={name: layer.k for name, layer in plan.items()},
                width={name: layer.width for name, layer in plan.items() if layer.width is not None} or None,
                size=size,
                flops=flops,
                distance=float(distances[index].mean()),
                samples=held_out.samples,
                layers=len(names),
                is_chosen=index == best,
            )
        )
    return plans[best], candidates


def _trial(model: Model, plans: Sequence[Plan], data: Dataset) -> tuple[int, list[str]]:
    """Return on how many inputs plans are compared, and the layers that are pruned for it.

    In a language model, these are some layers, spread evenly, so that all candidates together take about as much memory
    and time as the pruning itself; of so much text that it is worth it.
    """
    names = [*plans[0]]
    if not isinstance(model, LanguageModel) or any(form_of(plan) != "drop-in" for plan in plans):
        return round(min(MOST_INPUTS, max(FEWEST_INPUTS, TRIAL_FLOPS / model.config.flops({}).total))), names
    places = torch.linspace(0, len(names) - 1, min(len(names), MOST_LAYERS)).round().int().tolist()
    share = len(plans) * len(places) / len(names)
    tokens = min(MOST_TOKENS, max(FEWEST_TOKENS, data.tokens / share))
    return max(FEWEST, round(tokens * data.samples / data.tokens)), [names[place] for place in places]


def _cheaper(model: Model, plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans with fewer weights (scope `static`) and FLOPs than the full model, all if there is none; those
    of LOW_RANK with few ranks alone (TRIED_RANKS), unless each has its own number of experts.
    """
    layers, full = model.config.moe_layers, model.config.flops({}).total

    def weights(name: str, plan: LayerPlan | None) -> int:
        return sum(map(math.prod, layers[name].shapes(plan).values()))

    def is_cheaper(plan: Plan) -> bool:
        is_static = all(layer.scope == "static" for layer in plan.values())
        is_smaller = sum(weights(*each) for each in plan.items()) < sum(weights(name, None) for name in plan)
        return model.config.flops(plan).total < full and (is_smaller or not is_static)

    found, counts = [], Counter[tuple[Any, ...]]()
    for plan in [plan for plan in plans if is_cheaper(plan)] or plans:
        first = next(iter(plan.values()))
        if first.is_low_rank:
            kept = first.compensation, *(layer.k for layer in plan.values())
            counts[kept] += 1
            if counts[kept] not in TRIED_RANKS:
                continue
        found.append(plan)
    return found


def repeat(model: Model, plan: Plan, data: Dataset, draws: int, seed: int, runtime: Runtime) -> Repeats:
    """Prune by one plan on random halves of the data that is fitted on, and compare predictions on the rest.

    The spread over random halves, drawn without replacement, is that of estimates from all of the data (McCarthy 1969).

    Raises a MoepruneError if there are fewer than FEWEST inputs.
    """
    if data.samples < FEWEST:
        raise MoepruneError(f"`--repeat` needs at least {FEWEST} samples, `{data.spec}` has {data.samples}")
    fitted_on, held_out = split(data)
    full = private_copy(model).to(runtime.torch_device)
    distances, agreements = [], []
    for draw in range(draws):
        pruned = apply_plan(model, plan, data=half(fitted_on, seed + draw), seed=seed, runtime=runtime)
        models = {0: pruned.to(runtime.torch_device)}
        distances.append(float(compare([models[0]], full, held_out, runtime)[0].mean()))
        agreements.append(changes(models, full, held_out, runtime, "compare draws")[0].agreement)
    agreement = [float(each) for each in agreements if each is not None]
    return Repeats(half(fitted_on, seed).samples, held_out.samples, distances, agreement or None)


def half(data: Dataset, seed: int) -> Dataset:
    """Return a random half of the data, in its order."""
    places = torch.randperm(data.samples, generator=torch.Generator().manual_seed(seed))[: max(1, data.samples // 2)]
    return data.part(sorted(places.tolist()), f"half {seed}")


def _shares(plan: Plan, pruned: Model, full: Model) -> tuple[float, float]:
    """Return the bytes and FLOPs of a pruned model as shares of the full one's; of a language model, as the plan of all
    layers leaves it.
    """
    one, all_of = pruned.cost(), full.cost()
    size, flops = one.bytes, one.flops_per_input.total
    if isinstance(full, LanguageModel) and form_of(plan) == "drop-in":
        first, layers = next(iter(plan.values())), full.config.moe_layers
        size, flops = PrunedBytes(full.folder, layers).of(first.k, first.width), full.config.flops(plan).total
    return size / all_of.bytes, flops / all_of.flops_per_input.total


def split(data: Dataset) -> tuple[Dataset, Dataset]:
    """Return about three quarters of the data, to fit candidates on, and the rest, to compare them on."""
    _, second = halves(0, data.samples)
    quarter = second[1::2] if len(second) > 1 else second
    rest = sorted({*range(data.samples)} - {*quarter.tolist()})
    return data.part(rest, "to fit candidates"), data.part(quarter.tolist(), "to compare candidates")


def fit_all(full: Model, plans: Sequence[Plan], data: Dataset, seed: int, runtime: Runtime) -> list[Model]:
    """Prune by each plan, with statistics of the full model, in one pass over the data."""
    prunings = [Pruning(full, private_copy(full), plan, None, True, seed) for plan in plans]
    with Walk(full, None, data, runtime) as walk:
        for index, name in enumerate(plans[0]):
            stage = walk.reach(name)
            stage.choose_by(dict.fromkeys(plan[name].compensation for plan in plans if plan[name].signal == "gram"))
            for pruning in prunings:
                pruning.prune(index, stage)
            del stage  # before the next one is made
    return [pruning.pruned for pruning in prunings]


def compare(models: Sequence[Model], full: Model, data: Dataset, runtime: Runtime) -> list[Tensor]:
    """Return the distance of each model's predictions from the full one's for each input (samples), in float64."""
    distances: list[list[Tensor]] = [[] for _ in models]
    has_head = full.input_format.has_head

    def distance(found: Tensor, expected: Tensor) -> Tensor:
        if has_head:
            return (found.softmax(-1) - expected.softmax(-1)).abs().sum(-1) / 2
        return (found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-12)

    for index, found, expected in run_paired(dict(enumerate(models)), full, data, runtime, "compare candidates"):
        change = by_rows(distance, found, expected)
        distances[index].append(change.reshape(len(change), -1).mean(1).cpu().double())
    return [torch.cat(parts) for parts in distances]


def select(distances: Sequence[Tensor], costs: Sequence[float], same: float = SAME) -> int:
    """Return the cheapest of the candidates whose mean distance over inputs is the same as the least one, or nearly so:
    the difference and its standard error together are no more than `same`.

    >>> near, nearly, far = torch.tensor([0.1, 0.3]), torch.tensor([0.105, 0.305]), torch.tensor([0.9, 0.8])
    >>> select([near, nearly, far], [3, 2, 1])
    1
    """
    means = [float(each.mean()) if bool(each.isfinite().all()) else math.inf for each in distances]
    nearest = min(range(len(means)), key=means.__getitem__)

    def is_near(index: int) -> bool:
        more = distances[index] - distances[nearest]
        error = float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else 0.0
        return means[index] - means[nearest] + error <= same

    near = [index for index in range(len(means)) if index == nearest or is_near(index)]
    return min(near, key=lambda index: (costs[index], means[index]))
