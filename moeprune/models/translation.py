"""Tensors of other libraries under our names, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.models.libraries import LAYERS
from moeprune.models.libraries.interface import Layout, ModelLibrary, as_dense, not_dense
from moeprune.models.model import Model
from moeprune.models.module import inner_name
from moeprune.models.vit import SoftMoEViT


def to_ours(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the state dict of our model for that of a library's own model."""
    shapes = layout.config.shapes({})
    ours = {}
    for entry in layout.entries:
        parts = [tensors[name] for name in entry.theirs]
        tensor = torch.stack(parts) if entry.split else parts[0]
        tensor = tensor.mT if entry.transposed else tensor
        ours[entry.ours] = tensor.reshape(shapes[entry.ours]).contiguous()
    return ours


def to_library(model: SoftMoEViT, library: ModelLibrary) -> dict[str, Tensor]:
    """Return the state dict of a library's own model that computes the same as ours.

    Raises:
        MoepruneError: the library cannot express it; all reasons are named.
    """
    config, refused = as_dense(model.config, model.plan)
    _require_none(refused + library.refusals(config), library.name)
    ours, theirs = model.state_dict(), {}
    entries = library.entries(config)
    assert set(ours) == {entry.ours for entry in entries}
    for entry in entries:
        tensor = ours[entry.ours].mT if entry.transposed else ours[entry.ours]
        for name, part in zip(entry.theirs, tensor.unbind() if entry.split else [tensor], strict=True):
            theirs[name] = part.reshape(entry.shape).clone(memory_format=torch.contiguous_format)
    return theirs


def to_module(model: Model, original: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the user's own model that computes the same as ours.

    Args:
        model: unpruned, or pruned statically with `renorm`.
        original: the model before its layers were replaced by ours; with any number of experts.

    Raises:
        MoepruneError: the libraries of the layers cannot express a plan; all reasons are named.
    """
    _require_none(
        [reason for name, plan in model.plan.items() if (reason := not_dense(name, plan))],
        ", ".join(model.config.libraries),
    )
    found = {inner_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, ours in model.moe_layers.items():
        path = inner_name(name)
        tensors = {key: found.pop(f"{path}.{key}".lstrip(".")) for key in ours.state_dict()}
        theirs = original.get_submodule(path)
        [library] = [library for library in LAYERS.values() if library.recognises(theirs)]
        restored = library.restore(theirs, tensors)
        found |= {f"{path}.{key}".lstrip("."): tensor for key, tensor in restored.items()}
    return found


def _require_none(refused: list[str], library: str) -> None:
    if refused:
        raise MoepruneError(
            f"`{library}` cannot express the model: {'; '.join(refused)}",
            "it takes unpruned models, and those pruned with `--scope static --compensate renorm`",
        )
