"""Layers of moeprune itself inside a model of the user's own code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer
from moeprune.models.libraries.interface import LayerLibrary


class OwnLayers(LayerLibrary):
    """Layers that need no translation."""

    name = "moeprune"

    def recognises(self, module: nn.Module) -> bool:
        """Return True for our layers."""
        return isinstance(module, MoELayer)

    def describe(
        self, module: nn.Module, name: str, tokens: int, version: str | None
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        """Return the layer's own config and tensors; see `LayerLibrary.describe`."""
        assert isinstance(module, MoELayer)
        if module.plan is not None:
            raise MoepruneError(f"layer `{name}` is already pruned", "adopt the unpruned model")
        return module.config, dict(module.state_dict())

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they are."""
        return dict(tensors)
