"""Our models as those of other libraries and of the user's own code: converted, compared and written."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moeprune.errors import MoepruneError, user_code
from moeprune.files.checkpoint import write_state_dict
from moeprune.layers.layer import MoELayer
from moeprune.models.adopted import AdoptedModel
from moeprune.models.architecture import ModuleConfig, ViTConfig
from moeprune.models.extra import decode_extra
from moeprune.models.language import LanguageModel
from moeprune.models.libraries import MODELS
from moeprune.models.libraries.layers import LAYERS, LayerLibrary, installed_version
from moeprune.models.loading import load_strictly
from moeprune.models.model import Model, names_of
from moeprune.models.opening import opened
from moeprune.models.parity import compare, difference, skipped, to_library
from moeprune.models.results import Export, ExportedLayer, Parity
from moeprune.plan import Plan


def export(model: Model | str | os.PathLike[str], output: str | Path, to: str, overwrite: bool = False) -> Export:
    """Write a model as a checkpoint that another library, or the user's own code, loads.

    Args:
        model: unpruned, or pruned statically with `renorm` or `renorm-refit`; or its file.
        output: the file to write; with a suffix .pt, .pth or .bin by torch.save, else as safetensors.
        to: the library; in a model of the user's own code, that of its layers.
        overwrite: replace an output that exists.

    Raises:
        MoepruneError: the library cannot express the model or computes something else, or the output
            cannot be written.
    """
    model = opened(model)
    if isinstance(model, LanguageModel):
        raise MoepruneError("the model is a folder of transformers already", "`moeprune prune` writes such folders")
    known, refused = model.config.libraries or tuple(MODELS), _not_dense(model.plan)
    possible = "`--scope static` and `--compensate renorm` or `renorm-refit`"
    hint = f"it takes unpruned models, and those pruned with {possible}" if refused else None
    if to not in known:
        raise MoepruneError(f"the model cannot be exported to `{to}`", f"give one of {', '.join(known)}")
    config = model.config
    if isinstance(config, ViTConfig):
        config = as_dense(config, model.plan)
        refused += MODELS[to].refusals(config)
    if refused:
        raise MoepruneError(
            f"`{', '.join(model.config.libraries) or to}` cannot express the model: {'; '.join(refused)}", hint
        )
    layers: dict[str, ExportedLayer] = {}
    if isinstance(model, AdoptedModel):
        if model.original is None:
            raise MoepruneError("it is not known what builds the model", "adopt it with the argument `factory`")
        original = model.original()
        tensors = to_module(model, original)
        layers = exported_layers(model, original)
        arguments = {} if layers else model.config.unpacked_arguments
        parity = compare_module(model, original, tensors)
    else:
        assert isinstance(config, ViTConfig)
        tensors, arguments = to_library(model, config, MODELS[to]), MODELS[to].arguments(config)
        parity = compare(model, MODELS[to], config, tensors)
    write_state_dict(output, tensors, overwrite)
    return Export(
        output=str(output), to=to, source=model.details.source, arguments=arguments, layers=layers, parity=parity,
        model=model.cost(),
    )  # fmt: skip


def to_module(model: AdoptedModel, original: nn.Module) -> dict[str, Any]:
    """Return the state dict of the user's own model that computes the same as ours.

    original: the model before its layers were replaced by ours; with any number of experts.
    """
    found = decode_extra(model.state_dict())
    for name, (library, theirs) in _original_layers(model, original).items():
        tensors = {key: found.pop(f"{name}.{key}") for key in model.moe_layers[name].state_dict()}
        restored = library.restore(theirs, tensors)
        found |= {f"{alias}.{key}": restored[key] for alias in names_of(model, name) for key in restored}
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def exported_layers(model: Model, original: nn.Module) -> dict[str, ExportedLayer]:
    """Return how to build the layers that have fewer experts than those of the original, by their names in it."""
    return {
        name.removeprefix("module").removeprefix("."): ExportedLayer(
            class_name=f"{type(theirs).__module__}.{type(theirs).__qualname__}",
            arguments=library.arguments(theirs, _of_kept_experts(model.moe_layers[name])),
        )
        for name, (library, theirs) in _original_layers(model, original).items()
        if name in model.plan
    }


def compare_module(model: Model, original: nn.Module, tensors: Mapping[str, Tensor]) -> Parity:
    """Compare our model with the user's own, whose pruned layers are built anew by their own classes."""
    parent = nn.ModuleDict({"module": original})
    if any(layer.config.mixes_batch for layer in model.moe_layers.values()):
        installed = installed_version("soft-mixture-of-experts")
        if not f"{installed}.".startswith("0.1."):
            return skipped(f"release {installed} is installed, whose dispatch softmax does not run over the batch")
    for name, (library, theirs) in _original_layers(model, original).items():
        if name in model.plan:
            try:
                with user_code(f"{type(theirs).__name__} cannot be built with fewer experts"):
                    smaller = library.rebuild(theirs, _of_kept_experts(model.moe_layers[name]))
                for alias in names_of(parent, name):
                    parent.set_submodule(alias, smaller)
            except MoepruneError as error:
                return skipped(error.message)
    load_strictly(parent["module"], tensors, "the exported tensors")
    return difference(model, parent["module"], "your own model")


def _original_layers(model: Model, original: nn.Module) -> dict[str, tuple[LayerLibrary, nn.Module]]:
    """Return the library and the module that each of our layers came from."""
    parent = nn.ModuleDict({"module": original})
    assert isinstance(model.config, ModuleConfig)
    return {name: (LAYERS[layer.library], parent.get_submodule(name)) for name, layer in model.config.layers.items()}


def _of_kept_experts(layer: MoELayer) -> Any:
    """Return the config of a dense layer of the experts that a layer keeps."""
    config: Any = layer.config  # a Record, too
    return config.with_width(layer.plan.width).replace(num_experts=layer.plan.k) if layer.plan else config


def as_dense(config: ViTConfig, plan: Plan) -> ViTConfig:
    """Return the dense architecture that computes the same as one whose routers know kept experts alone."""
    blocks = list(config.blocks)
    for index, block in enumerate(blocks):
        layer = plan.get(f"blocks.{index}.soft_moe")
        if block.soft_moe is not None and layer is not None and layer.k:
            smaller = block.soft_moe.replace(num_experts=layer.k, hidden_dim=layer.width or block.soft_moe.hidden_dim)
            blocks[index] = block.replace(soft_moe=smaller)
    return config.replace(blocks=tuple(blocks))


def _not_dense(plan: Plan) -> list[str]:
    """Return all reasons why no dense layers of fewer experts compute the same as pruned ones."""
    reasons = []
    for name, layer in plan.items():
        if layer.scope != "static":
            reasons.append(f"layer `{name}` chooses its experts anew for each {layer.scope} (scope {layer.scope})")
        elif layer.compensation == "linear":
            reasons.append(f"layer `{name}` is a linear map, without experts")
        elif layer.k == layer.num_experts and layer.has_surrogate:
            reasons.append(f"layer `{name}` has compensation {layer.compensation} beside its experts")
        elif not layer.k or (layer.drops and not layer.cuts_router):
            reasons.append(
                f"layer `{name}` has compensation {layer.compensation}, under which the router still weighs"
                " the dropped experts; a layer of the kept ones alone computes another function"
            )
    return reasons
