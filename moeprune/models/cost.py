"""Size and cost of a model, from the shapes and types of its tensors; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from moeprune.files.header import TensorInfo
from moeprune.layers.flops import Usage
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.plan import Plan

if TYPE_CHECKING:
    from moeprune.models.architecture import ModelConfig


def size_and_cost(
    config: ModelConfig, plan: Plan, tensors: Mapping[str, TensorInfo], usage: Mapping[str, Usage] | None = None
) -> ModelCost:
    """Return parameters, bytes, FLOPs per input and experts per input of a model.

    For a plan with a mass and without measured usage, the largest possible number of experts is counted.

    Args:
        config: of the unpruned model.
        plan: of its pruned layers.
        tensors: of the model.
        usage: measured, of layers whose plans do not fix it.
    """
    usage, layers = usage or {}, config.moe_layers
    parts = {"experts": 0, "routing": 0, "compensation": 0, "other": 0}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        parts[layers[layer].part(key) if layer in layers else "other"] += tensor.nbytes
    experts: dict[str, float] = {name: layer.num_experts for name, layer in layers.items()}
    experts |= {name: layer.k for name, layer in plan.items()}
    experts |= {name: of_layer.running for name, of_layer in usage.items()}
    flops = config.flops(plan, usage)
    return ModelCost(
        parameters=sum(tensor.numel for tensor in tensors.values()),
        bytes=sum(parts.values()),
        bytes_by_part=BytesByPart(**parts),
        flops_per_input=FlopsByPart(total=flops.total, **asdict(flops)),
        experts_per_input=float(sum(experts.values())),
    )
