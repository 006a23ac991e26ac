"""The way back: our models as checkpoints of other libraries and of the user's own code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import write_state_dict
from moeprune.models.adopted import AdoptedModel, load_foreign
from moeprune.models.architecture import ViTConfig
from moeprune.models.libraries import MODELS
from moeprune.models.libraries.layers import LAYERS
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.model import Model
from moeprune.models.parity import compare, difference, skipped
from moeprune.models.results import Export
from moeprune.plan import Plan


def export(model: Model, output: str | Path, to: str, overwrite: bool = True) -> Export:
    """Write a model as a checkpoint that another library, or the user's own code, loads.

    Args:
        model: unpruned, or pruned statically with `renorm`.
        output: the file to write; with a suffix .pt, .pth or .bin by torch.save, else as safetensors.
        to: the library; in a model of the user's own code, that of its layers.
        overwrite: replace an output that exists.

    Raises:
        MoepruneError: the library cannot express the model or computes something else, or the output
            cannot be written.
    """
    known, refused = model.config.libraries or tuple(MODELS), _not_dense(model.plan)
    if to not in known:
        raise MoepruneError(f"the model cannot be exported to `{to}`", f"give one of {', '.join(known)}")
    if isinstance(model, AdoptedModel):
        _require_none(refused, ", ".join(known))
        if model.original is None:
            raise MoepruneError("it is not known what builds the model", "adopt it with the argument `factory`")
        original, arguments = model.original(), model.config.arguments
        tensors = to_module(model, original)
        if model.plan:
            parity = skipped("your code builds the unpruned model")
        else:
            load_foreign(original, tensors, "the exported tensors")
            parity = difference(model, original, "your own model")
    else:
        assert isinstance(model.config, ViTConfig)
        library, config = MODELS[to], as_dense(model.config, model.plan)
        _require_none(refused + library.refusals(config), to)
        tensors, arguments = to_library(model, config, library), library.arguments(config)
        parity = compare(model, library, config, tensors)
    write_state_dict(output, tensors, overwrite)
    return Export(
        output=str(output), to=to, source=model.details.source, arguments=arguments, parity=parity, model=model.cost()
    )


def to_library(model: Model, config: ViTConfig, library: SoftMoEViTs) -> dict[str, Tensor]:
    """Return the state dict of a library's own model that computes the same as ours; config: see `as_dense`."""
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
        original: the model before its layers were replaced by ours; with any number of experts.
    """
    found, parent = dict(model.state_dict()), nn.ModuleDict({"module": original})
    for name, ours in model.moe_layers.items():
        tensors = {key: found.pop(f"{name}.{key}") for key in ours.state_dict()}
        theirs = parent.get_submodule(name)
        [library] = [library for library in LAYERS.values() if library.recognises(theirs)]
        found |= {f"{name}.{key}": tensor for key, tensor in library.restore(theirs, tensors).items()}
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def as_dense(config: ViTConfig, plan: Plan) -> ViTConfig:
    """Return the dense architecture that computes the same as one pruned statically with `renorm`."""
    blocks = list(config.blocks)
    for index, block in enumerate(blocks):
        layer = plan.get(f"blocks.{index}.soft_moe")
        if block.soft_moe is not None and layer is not None and layer.k:
            blocks[index] = block.replace(soft_moe=block.soft_moe.replace(num_experts=layer.k))
    return config.replace(blocks=tuple(blocks))


def _not_dense(plan: Plan) -> list[str]:
    """Return all reasons why no dense layers of fewer experts compute the same as pruned ones."""
    reasons = []
    for name, layer in plan.items():
        if layer.scope != "static":
            reasons.append(f"layer `{name}` chooses its experts anew for each {layer.scope} (scope {layer.scope})")
        elif not layer.k or (layer.compensation != "renorm" and layer.k < layer.num_experts):
            reasons.append(
                f"layer `{name}` has compensation {layer.compensation}, under which the router still weighs"
                " the dropped experts; a layer of the kept ones alone computes another function"
            )
    return reasons


def _require_none(refused: list[str], library: str) -> None:
    if refused:
        raise MoepruneError(
            f"`{library}` cannot express the model: {'; '.join(refused)}",
            "it takes unpruned models, and those pruned with `--scope static --compensate renorm`",
        )
