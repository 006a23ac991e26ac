"""How many experts each layer keeps so that a budget is met: planned from an analysis, without data.

What a static set of k experts loses in a layer is known from the analysis: the least error that backward
elimination finds for k. Layers are made comparable by two measures of an error, whose geometric mean is
taken: its share of the layer's output, and how much the model's predictions change with it. Costs are
bytes or FLOPs; the budget is split so that the sum of the losses is least.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from moeprune.amounts import experts_to_keep, parse_budget
from moeprune.calibration.analysis import Analysis
from moeprune.errors import MoepruneError
from moeprune.files.header import TensorInfo
from moeprune.models.architecture import ModelConfig
from moeprune.plan import LOW_RANK, LayerPlan, Method, Plan, require_fitting_plan, uniform_plan
from moeprune.pruning.compensation import too_large_refits

EMPTY = ("mean", "lstsq", "affine", *LOW_RANK, "linear")  # compensations that can do without experts


class TooSmall(MoepruneError):
    """No plan of a method is within a budget; smallest: what the least one takes, in bytes or FLOPs."""

    def __init__(self, message: str, hint: str, smallest: float):
        super().__init__(message, hint)
        self.smallest = smallest


class Costs(NamedTuple):
    """The cost of a model under every plan of one scope and compensation, in bytes or FLOPs.

    full: of the unpruned model. rest: of what is in no MoE layer. layers: of each layer with k = 0…n experts; infinite
    where it cannot be pruned so, and for k = 0, unless the method can do without experts.
    """

    full: float
    rest: float
    layers: dict[str, list[float]]

    def of(self, experts: Mapping[str, int]) -> float:
        """Return what the model costs with k experts in each layer."""
        return self.rest + math.fsum(self.layers[name][k] for name, k in experts.items())


def costs_of(config: ModelConfig, method: Method, tensors: Mapping[str, TensorInfo] | None) -> Costs:
    """Return the costs of an unpruned model: in bytes, with the tensors of its checkpoint, else in FLOPs per input."""
    method, cost = method.replace(mass=None, energy=None), partial(_cost, config, tensors)
    layers, least = {}, 0 if method.scope == "static" and method.compensate in EMPTY and method.width is None else 1
    for name, layer in config.moe_layers.items():
        is_static = method.scope == "static"
        layers[name] = [math.inf] * least
        for k in range(least, layer.num_experts + 1):
            is_refused = layer.refusal(method.plan_of(layer, name, k))
            plan = method.plan_of(layer, name, k, tuple(range(k)) if is_static else None)
            layers[name].append(math.inf if is_refused else float(cost(name, plan)))
    full = config.flops({}).total if tensors is None else sum(tensor.nbytes for tensor in tensors.values())
    return Costs(full, full - sum(cost(name, None) for name in layers), layers)


def _cost(config: ModelConfig, tensors: Mapping[str, TensorInfo] | None, name: str, plan: LayerPlan | None) -> float:
    """Return what a layer costs, see `costs_of`."""
    layer = config.moe_layers[name]
    if tensors is None:
        return layer.flops(config.tokens(name), plan).total
    weight = tensors[f"{name}.fc2_weight"]
    item = weight.nbytes / weight.numel
    return sum(
        math.prod(shape) * (4 if tensor == "score_weights" else item)  # those are float32 always
        for tensor, shape in layer.shapes(plan).items()
    )


def narrower_within(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    max_size: str | float | None = None,
    max_flops: str | float | None = None,
) -> Plan | None:
    """Return the plan that keeps all experts, each with the largest share of its hidden units that a budget allows.

    None if one unit is too many, or a layer has none that could be dropped. See `plans_within` for the arguments.
    """
    layers, given = config.moe_layers, max_flops if max_size is None else max_size
    most = max((layer.hidden_units or 0 for layer in layers.values()), default=0)
    if not all(layer.hidden_units and "static" in layer.scopes for layer in layers.values()) or given is None:
        return None

    in_bytes = None if max_size is None else tensors
    costs = costs_of(config, Method(), in_bytes)
    budget, is_share = parse_budget(given, "FLOPs" if max_size is None else "B", "budget")
    budget *= costs.full if is_share else 1

    def plan(units: int) -> Plan:
        return uniform_plan(layers, Fraction(1), Method("static", "gram", width=f"{units}/{most}"))

    def is_too_large(units: int) -> bool:
        return costs.rest + math.fsum(_cost(config, in_bytes, *each) for each in plan(units).items()) > budget

    units = bisect_left(range(1, most), True, key=is_too_large)
    return plan(units) if units else None


def plans_within(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    analysis: Analysis | None,
    method: Method,
    max_size: str | float | None = None,
    max_flops: str | float | None = None,
) -> list[Plan]:
    """Return the plan for a budget and, if it is another, the one with the same share in each layer.

    With scope `static` the budget is split over the layers by what they lose, otherwise each layer keeps the
    same share of its experts. Which experts are kept is left open.

    Args:
        config, tensors, analysis: of the unpruned model; the analysis is needed with scope `static`.
        method: budgets are met without what its energy may save.
        max_size, max_flops: the bytes or FLOPs that may remain (see moeprune.amounts.parse_budget); one is given.

    Raises a MoepruneError if the budget cannot be met, or a layer cannot be pruned so.
    """
    given, unit, option = (max_flops, "FLOPs", "--max-flops") if max_size is None else (max_size, "B", "--max-size")
    assert given is not None
    budget, is_share = parse_budget(given, unit, option)
    costs = costs_of(config, method, None if max_size is None else tensors)
    sizes = {name: layer.num_experts for name, layer in config.moe_layers.items()}
    shares = sorted({Fraction(k, n) for n in sizes.values() for k in range(n + 1)})
    uniform = [{name: int(experts_to_keep(part, n, name)) for name, n in sizes.items()} for part in shares]
    smallest = min(costs.of(experts) for experts in uniform)
    if method.scope == "static":
        smallest = costs.rest + math.fsum(min(layer) for layer in costs.layers.values())
    if smallest == math.inf:
        require_fitting_plan({name: method.plan(n, n) for name, n in sizes.items()}, config.moe_layers)
    if is_share:
        budget *= costs.full
    if smallest > budget:
        least = f"{math.ceil(smallest / costs.full * 1e4) / 1e4:g}" if is_share else f"{math.ceil(smallest)}{unit}"
        what = f"`{option} {given}` is less than any plan with {method} takes"
        raise TooSmall(what, f"give at least {least}", smallest)
    chosen = [experts for experts in uniform if costs.of(experts) <= budget][-1:]
    if method.scope == "static":
        if analysis is None:
            raise MoepruneError(f"`{option}` with scope static needs an analysis", "write one with `moeprune analyze`")
        chosen.insert(0, allocate(losses(analysis, method.compensate), costs.layers, budget - costs.rest))
    plans = [{name: method.plan_of(config.moe_layers[name], name, k) for name, k in each.items()} for each in chosen]
    require_fitting_plan(plans[0], config.moe_layers)
    return plans[:1] if plans[0] == plans[-1] else plans


def plans_within_budget(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    analysis: Analysis | None,
    ways: Sequence[Method],
    max_size: str | float | None = None,
    max_flops: str | float | None = None,
) -> list[Plan]:
    """Return the plans of `plans_within` of each method that can meet a budget, without refits that are too large.

    Raises the MoepruneError of the method that takes least if none can.
    """
    plans, refused = list[Plan](), list[TooSmall]()
    for method in ways:
        try:
            plans += plans_within(config, tensors, analysis, method, max_size, max_flops)
        except TooSmall as error:
            refused.append(error)
    if not plans:
        raise min(refused, key=lambda error: error.smallest)
    return [plan for plan in plans if not too_large_refits(config.moe_layers, plan)] or plans[:1]


def losses(analysis: Analysis, compensation: str) -> dict[str, list[float]]:
    """Return what each layer loses with its best k experts kept, k = 0…n."""
    found = {}
    for name, layer in analysis.layers.items():
        power = max(float(layer.gram.sum()), 1e-30)  # of the layer's output
        scale = math.sqrt(max(float(layer.sensitivity), 0.0) / power)
        found[name] = [scale * max(error, 0.0) for error in reversed(layer.errors(compensation))]
    return found


def allocate(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float
) -> dict[str, int]:
    """Return the k of each layer whose losses sum to the least that is found within a budget.

    Starts with the cheapest choice of every layer and takes the steps of the layers' lower convex hulls,
    those that gain most for their cost first; what is left of the budget then goes to single steps.

    losses, costs: of each layer with k experts kept, k = 0…n. budget: of the costs' sum; the cheapest choices are
    taken to be affordable.
    """
    hulls = {name: _hull(losses[name], costs[name]) for name in costs}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = math.fsum(costs[name][k] for name, k in chosen.items())
    steps = []
    for order, (name, hull) in enumerate(hulls.items()):
        for index, (k, larger) in enumerate(pairwise(hull)):
            gain = (losses[name][k] - losses[name][larger]) / (costs[name][larger] - costs[name][k])
            steps.append((-gain, order, index, name, larger))
    stopped = set()
    for *_, name, larger in sorted(steps):
        more = costs[name][larger] - costs[name][chosen[name]]
        if spent + more > budget:
            stopped.add(name)  # a later step of this layer would leave this one out
        elif name not in stopped:
            chosen[name], spent = larger, spent + more
    while True:  # spend what is left where one more expert gains most for its cost
        ways = []
        for name, k in chosen.items():
            if k + 1 < len(losses[name]):
                more = costs[name][k + 1] - costs[name][k]
                gain = losses[name][k] - losses[name][k + 1]
                if spent + more <= budget and (gain > 0 or more <= 0):
                    ways.append((-gain / more if more > 0 else -math.inf, name, more))
        if not ways:
            return chosen
        _, name, more = min(ways)
        chosen[name], spent = chosen[name] + 1, spent + more


def _hull(losses: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Return the choices of k, of finite cost, on the lower convex hull of losses over costs, from the cheapest on."""
    order = sorted((k for k in range(len(losses)) if costs[k] < math.inf), key=lambda k: (costs[k], losses[k]))
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
