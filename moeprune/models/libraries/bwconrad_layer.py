"""Layers of soft-moe (bwconrad): tokens and phi to unit length, dispatch of the normalised tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.modules import class_name, expert_linears, stack_experts, unstack_experts

LIBRARY = "soft-moe"


def recognises(module: nn.Module) -> bool:
    """Whether a module is a layer of this library."""
    return class_name(module) == "soft_moe.soft_moe.SoftMoELayerWrapper"


def describe(
    module: nn.Module, name: str, tokens: int, version: str | None
) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
    """The layer as ours, and its tensors by our names.

    Args:
        module: a layer of the library.
        name: of the layer.
        tokens: m, of an input.
        version: of the library, where the user names it.

    Raises:
        MoepruneError: the experts cannot be expressed.
    """
    tensors = dict(module.state_dict())
    kind, hidden_dim, experts = stack_experts(module.experts, f"{name}.experts")  # type: ignore[arg-type]
    d, n, p = tensors["phi"].shape
    normalizes = "scale" in tensors
    routing = ("l2", "normalized") if normalizes else ("none", "raw")
    router = {key: tensors[key] for key in ("phi", "scale") if key in tensors}
    return SoftMoEConfig(d, n, p, hidden_dim, *routing, kind), router | experts


def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our layer by the library's names.

    Args:
        module: a layer of the library, whose structure is taken.
        tensors: of our layer, unpruned or with fewer experts.
    """
    experts: Any = module.experts
    first, second = (path for path, _ in expert_linears(experts[0]))
    router = {key: tensors[key] for key in ("phi", "scale") if key in tensors}
    return router | unstack_experts(tensors, f"experts.{{}}.{first}", f"experts.{{}}.{second}")


def rename_old_keys(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The tensors as they are: this library never renamed them."""
    return dict(tensors)
