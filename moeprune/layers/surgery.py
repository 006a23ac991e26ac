"""A dense layer made into one that follows a plan.

Axes: n experts, p slots per expert, d width of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.layers.merging import merged_experts
from moeprune.layers.soft_moe import SoftMoE, layer_of_tensors
from moeprune.plan import LayerPlan


def prune_layer(
    layer: SoftMoE,
    plan: LayerPlan,
    score_weights: Tensor | None = None,
    slot_mean: Tensor | None = None,
    mean_mass: Tensor | None = None,
) -> SoftMoE:
    """A layer that follows the plan, made of a dense one; what `affine` adds is zero yet.

    Args:
        layer: dense.
        plan: what to do.
        score_weights: with scope `input` or `batch` what the signal multiplies each expert's mass with
            (`deviation`) or takes for it (`random`); None where the signal is the mass alone. (n)
        slot_mean: mu (n,p,d), for a compensation with surrogates.
        mean_mass: of each expert (n), for `merge`.
    """
    tensors = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    device = layer.fc2_weight.device
    if plan.scope == "static":
        tensors["phi"] = tensors["phi"][:, list(plan.columns)]
        if plan.merges:
            assert mean_mass is not None
            merged = merged_experts(layer.experts, plan, mean_mass)._asdict()
            tensors |= {name: tensor for name, tensor in merged.items() if tensor is not None}
        else:
            kept = torch.tensor(plan.kept, dtype=torch.int64, device=device)
            tensors |= {name: tensor[kept] for name, tensor in tensors.items() if name.startswith("fc")}
    elif score_weights is not None:
        tensors["score_weights"] = score_weights.to(device, torch.float32)
    if plan.has_surrogate:
        assert slot_mean is not None
        if plan.scope == "static":
            slot_mean = static_surrogate(plan, slot_mean)
        tensors["surrogate"] = slot_mean.to(layer.fc2_weight, copy=True)
    for name, shape in layer.config.shapes(plan).items():
        if name.startswith("affine"):
            tensors[name] = layer.fc2_weight.new_zeros(shape)
    return layer_of_tensors(layer.config, plan, tensors)


def static_surrogate(plan: LayerPlan, slot_mean: Tensor) -> Tensor:
    """mu (n,p,d) in the order of phi's columns, zero for kept slots, which have their own outputs."""
    surrogate = slot_mean[list(plan.columns)]
    surrogate[: plan.k] = 0
    return surrogate
