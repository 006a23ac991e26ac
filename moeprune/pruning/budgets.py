"""How many experts each layer keeps so that a budget is met: planned from an analysis, without data.

What a static set of k experts loses in a layer is known from the analysis: the least error that backward
elimination finds for k. Layers are made comparable by two measures of an error, whose geometric mean is
taken: its share of the layer's output, and how much the model's predictions change with it. Costs are
bytes or FLOPs; the budget is split so that the sum of the losses is least.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from moeprune.calibration.analysis import Analysis
from moeprune.errors import MoepruneError
from moeprune.files.header import TensorInfo
from moeprune.layers.interface import LayerConfig
from moeprune.models.architecture import ModelConfig
from moeprune.plan import (
    LayerPlan,
    Plan,
    experts_to_keep,
    is_possible,
    require_fitting_plan,
    uniform_plan,
)


@dataclass(frozen=True)
class Costs:
    """What a model costs under every plan of one scope and compensation, in bytes or FLOPs.

    full: of the unpruned model. rest: of what is in no Soft MoE layer. layers: of each layer with
    k = 0…n experts; infinite where there is no such plan.
    """

    full: float
    rest: float
    layers: dict[str, list[float]]

    def of(self, experts: Mapping[str, int]) -> float:
        """What the model costs with k experts in each layer."""
        return self.rest + math.fsum(self.layers[name][k] for name, k in experts.items())


def size_costs(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    scope: str,
    signal: str,
    compensation: str,
) -> Costs:
    """Costs in bytes.

    Args:
        config: of the unpruned model.
        tensors: of its checkpoint.
        scope: see moeprune.plan.LayerPlan, like signal and compensation.
    """
    full = float(sum(tensor.nbytes for tensor in tensors.values()))
    in_layers = 0
    layers = {}
    for name, layer in config.moe_layers.items():
        in_layers += sum(tensors[f"{name}.{tensor}"].nbytes for tensor in layer.shapes(None))
        weight = tensors[f"{name}.fc2_weight"]
        item = weight.nbytes / weight.numel
        layers[name] = [
            math.inf if plan is None else _layer_bytes(layer, plan, item)
            for plan in _plans_of(layer, scope, signal, compensation)
        ]
    return Costs(full, full - in_layers, layers)


def _layer_bytes(layer: LayerConfig, plan: LayerPlan, item: float) -> float:
    return sum(
        math.prod(shape) * (4 if name == "score_weights" else item)  # those are float32 in any case
        for name, shape in layer.shapes(plan).items()
    )


def flops_costs(config: ModelConfig, scope: str, signal: str, compensation: str) -> Costs:
    """Costs in FLOPs of one input; see `size_costs`."""
    full = config.flops({}).total
    layers = {}
    dense = 0
    for name, layer in config.moe_layers.items():
        tokens = config.tokens(name)
        dense += layer.flops(tokens).total
        layers[name] = [
            math.inf if plan is None else float(layer.flops(tokens, plan).total)
            for plan in _plans_of(layer, scope, signal, compensation)
        ]
    return Costs(full, full - dense, layers)


def _plans_of(layer: LayerConfig, scope: str, signal: str, compensation: str) -> list[LayerPlan | None]:
    """The plans of a layer that keep 0, 1, … n experts; None where there is none."""
    n = layer.num_experts
    return [
        None
        if (k == 0 and compensation in ("renorm", "merge")) or not is_possible(scope, signal, compensation)
        else LayerPlan(scope, k, n, signal, compensation, tuple(range(k)) if scope == "static" else None)
        for k in range(n + 1)
    ]


def plans_for(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    analysis: Analysis | None,
    *,
    keep: Fraction | int | None = None,
    mass: float | None = None,
    max_size: float | None = None,
    max_flops: float | None = None,
    scope: str,
    signal: str,
    compensation: str,
    energy: float | None = None,
) -> list[Plan]:
    """Plans for a number of experts or a budget, one of which is given: the planned one, and for a budget
    that is split over layers also the one that keeps the same share in each, where that is another.

    Args:
        config: of the unpruned model.
        tensors: of its checkpoint.
        analysis: of the model; needed for budgets with scope `static`.
        keep: the share or number of experts in each layer.
        mass: the share of an input's combine mass that its experts hold, with scope `input`.
        max_size: the share of the model's bytes that may remain.
        max_flops: likewise, of its FLOPs.
        scope: see moeprune.plan.LayerPlan, like signal, compensation and energy. Budgets are met without what
            an energy may save.

    Raises:
        MoepruneError: the budget cannot be met, a layer cannot be pruned so, or more experts are to be kept
            than there are.
    """
    if keep is not None or mass is not None:
        experts = {name: layer.num_experts for name, layer in config.moe_layers.items()}
        keep = Fraction(1) if keep is None else keep
        plan = uniform_plan(experts, keep, scope, signal, compensation, mass, energy)
        require_fitting_plan(plan, config.moe_layers)
        return [plan]
    if max_size is not None:
        costs, budget = size_costs(config, tensors, scope, signal, compensation), max_size
    else:
        assert max_flops is not None
        costs, budget = flops_costs(config, scope, signal, compensation), max_flops
    option = "--max-flops" if max_size is None else "--max-size"
    planned = plan_within(
        config, costs, budget, analysis,
        scope=scope, signal=signal, compensation=compensation, energy=energy, option=option,
    )  # fmt: skip
    require_fitting_plan(planned, config.moe_layers)
    share = uniform_within(costs, budget)
    uniform = (
        planned if share is None else plan_of_experts(config, share, scope, signal, compensation, energy)
    )
    return [planned] if uniform == planned else [planned, uniform]


def plan_within(
    config: ModelConfig,
    costs: Costs,
    budget: float,
    analysis: Analysis | None,
    *,
    scope: str,
    signal: str,
    compensation: str,
    energy: float | None = None,
    option: str,
) -> Plan:
    """The plan that costs a share of the full model at most and is expected to lose least.

    With scope `static` the budget is split over the layers by what they lose, with the others each layer
    keeps the same share of its experts. Which experts are kept is left open.

    Args:
        config: of the unpruned model.
        costs: of its plans.
        budget: the share.
        analysis: of the model; needed with scope `static`.
        scope: see moeprune.plan.LayerPlan, like signal, compensation and energy.
        option: how messages call the budget.

    Raises:
        MoepruneError: even the cheapest plan costs more.
    """
    if scope == "static":
        smallest = costs.rest + math.fsum(min(layer[1:]) for layer in costs.layers.values())
    else:
        smallest = min(costs.of(experts) for experts in _uniform_choices(costs))
    smallest /= costs.full
    if smallest > budget:
        raise MoepruneError(
            f"`{option} {budget:g}` is less than any plan takes with scope {scope} and compensation"
            f" {compensation}",
            f"the least that can be given is {math.ceil(smallest * 1e4) / 1e4:g}",
        )
    if scope == "static":
        if analysis is None:
            raise MoepruneError(
                f"`{option}` with scope static needs an analysis", "write one with `moeprune analyze`"
            )
        available = budget * costs.full - costs.rest
        experts = allocate(losses(analysis, compensation), costs.layers, available)
    else:
        uniform = uniform_within(costs, budget)
        assert uniform is not None
        experts = uniform
    return plan_of_experts(config, experts, scope, signal, compensation, energy)


def uniform_within(costs: Costs, budget: float) -> dict[str, int] | None:
    """The experts of each layer with the largest share of them, the same in each, that costs a share of the
    full model at most; None where there is no such share.
    """
    affordable = [experts for experts in _uniform_choices(costs) if costs.of(experts) <= budget * costs.full]
    return affordable[-1] if affordable else None


def _uniform_choices(costs: Costs) -> list[dict[str, int]]:
    """The experts of each layer with the same share of them in each, from the fewest to all."""
    sizes = {name: len(layer) - 1 for name, layer in costs.layers.items()}
    shares = sorted({Fraction(k, n) for n in sizes.values() for k in range(1, n + 1)})
    return [{name: experts_to_keep(share, n, name) for name, n in sizes.items()} for share in shares]


def plan_of_experts(
    config: ModelConfig,
    experts: Mapping[str, int],
    scope: str,
    signal: str,
    compensation: str,
    energy: float | None = None,
) -> Plan:
    """The plan that keeps k experts in each layer, which the signal is yet to choose."""
    return {
        name: LayerPlan(scope, experts[name], layer.num_experts, signal, compensation, energy=energy)
        for name, layer in config.moe_layers.items()
    }


def losses(analysis: Analysis, compensation: str) -> dict[str, list[float]]:
    """What each layer loses with its best k experts kept, k = 0…n."""
    found = {}
    for name, layer in analysis.layers.items():
        n = layer.num_experts
        errors = layer.errors(compensation)
        power = max(float(layer.gram.sum()), 1e-30)  # of the layer's output
        scale = math.sqrt(max(float(layer.sensitivity), 0.0) / power)
        found[name] = [scale * max(errors[n - k], 0.0) for k in range(n + 1)]
    return found


def allocate(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """The k of each layer whose losses sum to the least that is found within a budget.

    Starts with the cheapest choice of every layer and takes the steps of the layers' lower convex hulls,
    those that gain most for their cost first; what is left of the budget then goes to single steps.

    Args:
        losses: of each layer with k experts kept, k = 0…n.
        costs: likewise.
        budget: what the costs may sum to; one expert in each layer is taken to be affordable.
    """
    hulls = {name: _hull(losses[name], costs[name]) for name in costs}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = math.fsum(costs[name][k] for name, k in chosen.items())
    steps: list[tuple[float, int, str, int]] = []
    for order, name in enumerate(costs):
        for index, (k, larger) in enumerate(zip(hulls[name], hulls[name][1:], strict=False)):
            gain = (losses[name][k] - losses[name][larger]) / (costs[name][larger] - costs[name][k])
            steps.append((-gain, order * 10**6 + index, name, larger))
    stopped = set()
    for _, _, name, larger in sorted(steps):
        more = costs[name][larger] - costs[name][chosen[name]]
        if name in stopped:
            continue
        if spent + more > budget:
            stopped.add(name)  # a later step of this layer would leave this one out
            continue
        chosen[name], spent = larger, spent + more
    return _fill(chosen, losses, costs, budget - spent)


def _hull(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """The choices of k ≥ 1 on the lower convex hull of losses over costs, from the cheapest on."""
    order = sorted(range(1, len(losses)), key=lambda k: (costs[k], losses[k]))
    hull: list[int] = []
    for k in order:
        if hull and losses[k] >= losses[hull[-1]]:
            continue
        while len(hull) >= 2:
            first, middle = hull[-2], hull[-1]
            slope = (losses[middle] - losses[first]) * (costs[k] - costs[first])
            if slope < (losses[k] - losses[first]) * (costs[middle] - costs[first]):
                break
            hull.pop()
        hull.append(k)
    return hull


def _fill(
    chosen: dict[str, int],
    losses: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    left: float,
) -> dict[str, int]:
    """Spend what is left on more experts, one at a time, where that gains most for its cost."""

    def step(name: str) -> tuple[float, str, float] | None:
        k = chosen[name]
        if k + 1 >= len(losses[name]):
            return None
        more = costs[name][k + 1] - costs[name][k]
        gain = losses[name][k] - losses[name][k + 1]
        if gain <= 0 < more:
            return None
        return (-gain / more if more > 0 else -math.inf, name, more)

    heap = [entry for name in chosen if (entry := step(name))]
    heapq.heapify(heap)
    while heap:
        _, name, more = heapq.heappop(heap)
        if more <= left:
            chosen[name], left = chosen[name] + 1, left - more
            if entry := step(name):
                heapq.heappush(heap, entry)
    return chosen
