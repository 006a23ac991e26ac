"""Models of the user's own code that hold our MoE layers, and the factories that build them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import tensor_infos
from moeprune.layers.families import new_layer
from moeprune.models.details import Details
from moeprune.models.model import Model
from moeprune.models.tensors import require_tensors
from moeprune.plan import Plan

if TYPE_CHECKING:  # the architecture builds the model, not the other way round
    from moeprune.models.architecture import ModuleConfig

Factory: TypeAlias = "str | Callable[..., nn.Module]"
"""Builds a model of the user's own code: a function, or its name `package.module:function`."""


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


def skeleton(config: ModuleConfig, plan: Plan, details: Details, factory: Factory) -> AdoptedModel:
    """Return the model of a checkpoint, without its weights.

    Raises:
        MoepruneError: the factory fails, or its model lacks a layer.
    """
    module = build(factory, config.arguments)
    for name, layer in config.layers.items():
        path = inner_name(name)
        try:
            module.get_submodule(path)
        except AttributeError:
            raise MoepruneError(f"`--model` builds a model without a layer `{path}`", "the code changed") from None
        with torch.device("meta"):
            module = replaced(module, path, new_layer(layer.layer, plan.get(name)))
    model = AdoptedModel(module, config, details)
    model.original = functools.partial(build, factory, config.arguments)
    return model


def inner_name(name: str) -> str:
    """Return the name of a part of an AdoptedModel in the user's own module."""
    return name.removeprefix("module").removeprefix(".")


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return the module with a part of it replaced, which may be the module itself."""
    if not name:
        return layer
    module.set_submodule(name, layer)
    return module


def build(factory: Factory, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the model that a factory builds; the current directory is searched for `package.module` too.

    Raises:
        MoepruneError: there is no such function, it fails, or it builds something else.
    """
    name = factory if isinstance(factory, str) else getattr(factory, "__qualname__", repr(factory))
    package, _, function = name.partition(":")
    if isinstance(factory, str) and not (package and function):
        raise MoepruneError(f"`--model {name}` is not a factory", "give `package.module:function`")
    here = str(Path.cwd())
    if isinstance(factory, str) and here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(package), function) if isinstance(factory, str) else factory
        model = found(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise MoepruneError(
            f"`--model {name}` fails: {type(error).__name__}: {error}",
            "check its name and `--model-arg`, and that it can be imported from here",
        ) from None
    if not isinstance(model, nn.Module):
        raise MoepruneError(f"`--model {name}` builds a {type(model).__name__}, expected a torch module")
    return model


def factory_name(factory: Factory | None) -> str | None:
    """Return `package.module:function` of a factory; None if it cannot be imported by that."""
    if factory is None or isinstance(factory, str):
        return factory
    name = getattr(factory, "__qualname__", "<unnamed>")
    return None if "<" in name else f"{factory.__module__}:{name}"


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load the tensors of a file into a module, which must have exactly these.

    Raises:
        MoepruneError: tensors are missing, unexpected, or of other shapes or types; all are listed.
    """
    own = module.state_dict()
    require_tensors(
        tensor_infos(tensors),
        {name: tuple(tensor.shape) for name, tensor in own.items()},
        f"`{path}` does not fit the model that `--model` builds",
        "give the function and the `--model-arg` that it was trained with",
        {name for name, tensor in own.items() if not tensor.is_floating_point()},
    )
    module.load_state_dict(dict(tensors), assign=True)
