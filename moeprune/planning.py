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

from moeprune.architecture import ModuleConfig, ViTConfig
from moeprune.calibration import Analysis
from moeprune.selection import drop_order

ModelConfig = ViTConfig | ModuleConfig


def losses(analysis: Analysis, compensation: str) -> dict[str, list[float]]:
    """What each layer loses with its best k experts kept, k = 0…n."""
    found = {}
    for name, layer in analysis.layers.items():
        n = layer.num_experts
        _, errors = drop_order(layer.gram_under(compensation).double(), n)
        power = max(float(layer.gram.sum()), 1e-30)  # of the layer's output
        scale = math.sqrt(float(layer.sensitivity) / power)
        found[name] = [scale * max(errors[n - k], 0.0) for k in range(n + 1)]
    return found


def allocate(
    losses: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], budget: float, least: int = 1
) -> dict[str, int] | None:
    """The k of each layer whose losses sum to the least that is found within a budget.

    Starts with the cheapest choice of every layer and takes the steps of the layers' lower convex hulls,
    those that gain most for their cost first; what is left of the budget then goes to single steps.

    Args:
        losses: of each layer with k experts kept, k = 0…n.
        costs: likewise.
        budget: what the costs may sum to.
        least: the smallest k.

    Returns:
        None where even the cheapest choice is beyond the budget.
    """
    hulls = {name: _hull(losses[name], costs[name], least) for name in losses}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = math.fsum(costs[name][k] for name, k in chosen.items())
    if spent > budget:
        return None
    steps: list[tuple[float, int, str, int]] = []
    for order, name in enumerate(losses):
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


def _hull(losses: Sequence[float], costs: Sequence[float], least: int) -> list[int]:
    """The choices of k on the lower convex hull of losses over costs, from the cheapest on."""
    order = sorted(range(min(least, len(losses) - 1), len(losses)), key=lambda k: (costs[k], losses[k]))
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
