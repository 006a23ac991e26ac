"""The one surgery: from a dense layer's tensors to those of a pruned layer, in memory or from file to file.

Axes: n experts, p terms per expert, o width of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.layers.merging import merged_experts
from moeprune.plan import LayerPlan

T = TypeVar("T")


class Calibrated(NamedTuple):
    """Calibrated values of a layer; None if the plan does not need them."""

    score_weights: Tensor | None = None  # of a routed plan: factors of each mass, or scores (`random`) (n)
    term_mean: Tensor | None = None  # mean output of each term (n,p,o)
    mean_mass: Tensor | None = None  # of each expert (n)


def prune_tensors(
    config: LayerConfig,
    plan: LayerPlan,
    take: Callable[[str, int | None, Sequence[int]], T],
    calibrated: Calibrated = Calibrated(),
) -> dict[str, T | Tensor]:
    """Return the tensors of a pruned layer by name; a fitted compensation starts as `mean`.

    take: returns a tensor of the dense layer by name, all of it (axis None) or the places of some experts
    along an axis, in their order.
    """
    tensors: dict[str, T | Tensor] = {}
    for name, shape in config.shapes(plan).items():
        if config.part(name) == "compensation":
            tensors[name] = torch.zeros(shape)
        elif name == "score_weights":
            assert calibrated.score_weights is not None
            tensors[name] = calibrated.score_weights.float()
        else:
            axis = config.expert_axis(name) if plan.scope == "static" else None
            experts = plan.kept or () if config.part(name) == "experts" else plan.columns
            tensors[name] = take(name, axis, experts)
    if plan.has_surrogate:
        assert calibrated.term_mean is not None
        surrogate = calibrated.term_mean
        if plan.scope == "static":  # in the order of the columns; kept experts have their own outputs
            surrogate = surrogate[list(plan.columns)]
            surrogate[: plan.k] = 0
        tensors["surrogate"] = surrogate
    return tensors


def prune_layer(layer: MoELayer, plan: LayerPlan, calibrated: Calibrated = Calibrated()) -> MoELayer:
    """Return a layer that follows the plan, made of a dense one."""
    dense = {name: tensor.detach() for name, tensor in layer.named_parameters()}
    like = layer.fc2_weight

    def take(name: str, axis: int | None, experts: Sequence[int]) -> Tensor:
        if axis is None:
            return dense[name]
        return dense[name].index_select(axis, torch.tensor(experts, dtype=torch.int64, device=like.device))

    tensors = prune_tensors(layer.config, plan, take, calibrated)
    for name, tensor in tensors.items():
        if name == "score_weights":
            tensors[name] = tensor.to(like.device)
        elif layer.config.part(name) == "compensation":
            tensors[name] = tensor.to(like, copy=True)
    if plan.merges:
        assert calibrated.mean_mass is not None
        tensors |= merged_experts(dense, plan, calibrated.mean_mass)
    return layer_of_tensors(layer.config, plan, tensors)
