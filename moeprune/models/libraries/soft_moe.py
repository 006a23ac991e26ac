"""Layers of soft-moe (bwconrad): tokens and phi scaled to unit length, normalised tokens dispatched."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.experts import class_name, stack_experts, unstack_experts
from moeprune.models.libraries.interface import LayerLibrary

ROUTER = ("phi", "scale")


class SoftMoELayers(LayerLibrary):
    """Layers inside models of the user's own code; SoftMoEViTs reads whole models."""

    name = "soft-moe"

    def recognises(self, module: nn.Module) -> bool:
        """Return True for a layer of this library."""
        return class_name(module) == "soft_moe.soft_moe.SoftMoELayerWrapper"

    def describe(
        self, module: nn.Module, name: str, tokens: int, version: str | None
    ) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
        """Return our config and tensors; see `LayerLibrary.describe`."""
        router = {key: tensor for key, tensor in module.state_dict().items() if key in ROUTER}
        kind, hidden_dim, experts = stack_experts(module.experts, f"{name}.experts")  # type: ignore[arg-type]
        d, n, p = router["phi"].shape
        routing = ("l2", "normalized") if "scale" in router else ("none", "raw")
        return SoftMoEConfig(d, n, p, hidden_dim, *routing, kind), router | experts

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the library's names; see `LayerLibrary.restore`."""
        router = {key: tensor for key, tensor in tensors.items() if key in ROUTER}
        [*experts] = module.experts  # type: ignore[misc]
        return router | unstack_experts(tensors, "experts", experts[0])
