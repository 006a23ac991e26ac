"""The families of layers: how a configuration is read and which module runs it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.interface import LayerConfig
from moeprune.plan import LayerPlan
from moeprune.records import from_json

if TYPE_CHECKING:
    from torch import Tensor

    from moeprune.layers.layer import MoELayer

FAMILIES: dict[str, tuple[Any, str]] = {"soft_moe": (SoftMoEConfig, "moeprune.layers.soft_moe:SoftMoE")}
"""By the `family` in JSON: the configuration, and the place of the module, imported late for torch."""


def register(config_class: Any, module_class: type) -> None:
    """Make a family known: its configuration (a tagged Record that is a LayerConfig) and its MoELayer."""
    place = f"{module_class.__module__}:{module_class.__qualname__}"
    FAMILIES[config_class.__struct_config__.tag] = config_class, place


def layer_from_json(value: Any, where: str) -> LayerConfig:
    """Read a layer's configuration from JSON values; without `family` it is a Soft MoE.

    Raises:
        MoepruneError: an unknown family, an unknown or missing key, or a value that does not fit.
    """
    family = value.get("family", "soft_moe") if isinstance(value, Mapping) else "soft_moe"
    if not isinstance(family, str) or family not in FAMILIES:
        raise MoepruneError(f"{where}: unknown family {family!r}", f"known are {', '.join(FAMILIES)}")
    return from_json(value, FAMILIES[family][0], where)


def new_layer(config: LayerConfig, plan: LayerPlan | None = None) -> MoELayer:
    """Return a layer of a configuration under a plan, with fresh weights."""
    module, _, name = FAMILIES[config.__struct_config__.tag][1].partition(":")  # type: ignore[attr-defined]
    return getattr(import_module(module), name)(config, plan)


def layer_of_tensors(config: LayerConfig, plan: LayerPlan | None, tensors: Mapping[str, Tensor]) -> MoELayer:
    """Return a layer whose parameters and buffers are these very tensors, to run and not to train."""
    import torch

    with torch.device("meta"):
        layer = new_layer(config, plan)
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False).eval()
