"""Models of the user's own code that hold our MoE layers, and the factories that build them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.families import new_layer
from moeprune.models.details import Details
from moeprune.models.model import Model
from moeprune.plan import Plan

if TYPE_CHECKING:  # the architecture builds the model, not the other way round
    from moeprune.models.architecture import ModuleConfig


class AdoptedModel(Model):
    """A model of the user's own code, `module`, in which all Soft MoE layers are ours.

    Inputs (b,c,H,W) in, logits (b,classes) out.
    """

    config: ModuleConfig

    def __init__(self, module: nn.Module, config: ModuleConfig, details: Details = Details()):
        super().__init__(config, details)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (b,c,H,W) in, logits (b,classes) out."""
        return self.module(x)


def skeleton(config: ModuleConfig, plan: Plan, details: Details) -> AdoptedModel:
    """The model of a checkpoint, built anew by its factory, whose weights are yet to be loaded.

    Raises:
        MoepruneError: the factory fails, or its model lacks a layer.
    """
    assert config.factory is not None
    module = build(config.factory, config.arguments)
    for name, layer in config.layers.items():
        path = name.removeprefix("module").removeprefix(".")
        try:
            module.get_submodule(path)
        except AttributeError:
            raise MoepruneError(
                f"the model of `{config.factory}` has no layer `{path}`", "the factory changed since"
            ) from None
        with torch.device("meta"):
            ours = new_layer(layer.layer, plan.get(name))
        module = replaced(module, path, ours)
    return AdoptedModel(module, config, details)


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return the module with a part of it replaced, which may be the module itself."""
    if not name:
        return layer
    module.set_submodule(name, layer)
    return module


def build(factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that a factory `package.module:function` builds; the current directory is searched too.

    Raises:
        MoepruneError: there is no such function, it fails, or it builds something else.
    """
    package, _, function = factory.partition(":")
    if not package or not function:
        raise MoepruneError(f"`--model {factory}` is no factory", "give `package.module:function`")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(package), function)
        model = found(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise MoepruneError(
            f"`--model {factory}` fails: {type(error).__name__}: {error}",
            "check its name and `--model-arg`, and that it can be imported from here",
        ) from None
    if not isinstance(model, nn.Module):
        raise MoepruneError(f"`--model {factory}` builds a {type(model).__name__}, expected a torch module")
    return model
