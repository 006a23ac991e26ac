"""Size and cost of a model, from the shapes and types of its tensors; no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from moeprune.files.header import TensorInfo
from moeprune.layers.flops import Usage
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.plan import Plan

if TYPE_CHECKING:
    from moeprune.models.architecture import ModelConfig


def size_and_cost(
    config: ModelConfig,
    plan: Plan,
    tensors: Mapping[str, TensorInfo],
    usage: Mapping[str, Usage] | None = None,
) -> ModelCost:
    """Return parameters, bytes, FLOPs per input and experts per input of a model.

    For a plan with a mass and without measured usage, the largest possible number of experts is counted.

    Args:
        config: of the unpruned model.
        plan: of its pruned layers.
        tensors: of the model.
        usage: measured, of layers whose plans do not fix it.
    """
    usage = usage or {}
    parts = {"experts": 0, "routing": 0, "compensation": 0, "other": 0}
    for name, tensor in tensors.items():
        parts[part_of(name, config.moe_layers)] += tensor.nbytes
    experts: dict[str, float] = {name: layer.num_experts for name, layer in config.moe_layers.items()}
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


def part_of(name: str, layers: Container[str]) -> str:
    """Return the part that a tensor belongs to: `experts`, `routing`, `compensation` or `other`."""
    module, _, tensor = name.rpartition(".")
    if module not in layers:
        return "other"
    if tensor.startswith("fc"):
        return "experts"
    is_compensation = tensor in ("surrogate", "basis") or tensor.startswith("affine")
    return "compensation" if is_compensation else "routing"
