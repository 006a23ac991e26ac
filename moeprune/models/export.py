"""The way back: our models as checkpoints of other libraries and of the user's own code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import write_state_dict
from moeprune.models.adopted import load_foreign
from moeprune.models.libraries import LAYERS, MODELS
from moeprune.models.libraries.interface import as_dense
from moeprune.models.model import Model
from moeprune.models.module import AdoptedModel, Factory
from moeprune.models.opening import load
from moeprune.models.parity import compare, difference, require_parity, skipped
from moeprune.models.results import Export, Parity
from moeprune.models.translation import to_library, to_module
from moeprune.models.vit import SoftMoEViT


def export(
    model: Model | str | Path,
    output: str | Path,
    to: str,
    factory: Factory | None = None,
    overwrite: bool = True,
) -> Export:
    """Write a model as a checkpoint that another library, or the user's own code, loads.

    Args:
        model: unpruned, or pruned statically with `renorm`; or the path of its checkpoint.
        output: the file to write; with a suffix .pt, .pth or .bin by torch.save, else as safetensors.
        to: the library; in a model of the user's own code, that of its layers.
        factory: see `load`, if the model is a path.
        overwrite: replace an output that exists.

    Raises:
        MoepruneError: the library cannot express the model or computes something else, or the output
            cannot be written.
    """
    if to not in MODELS and to not in LAYERS:
        raise MoepruneError(f"unknown library `{to}`", f"give one of {', '.join({**MODELS, **LAYERS})}")
    model = model if isinstance(model, Model) else load(model, factory)
    if model.config.libraries:
        tensors, arguments, parity = _of_own_code(model, to)
    else:
        tensors, arguments, parity = _of_library(model, to)
    require_parity(parity, f"`{to}`", output)
    write_state_dict(output, tensors, overwrite)
    return Export(
        output=str(output),
        to=to,
        source=model.details.source,
        arguments=arguments,
        parity=parity,
        model=model.cost(),
    )


def _of_library(model: Model, to: str) -> tuple[Mapping[str, Tensor], dict[str, Any], Parity]:
    if to not in MODELS:
        raise MoepruneError(
            f"`{to}` has no whole models, only layers for models of your own code",
            f"give one of {', '.join(MODELS)}",
        )
    library = MODELS[to]
    assert isinstance(model, SoftMoEViT)
    tensors = to_library(model, library)
    config, _ = as_dense(model.config, model.plan)
    return tensors, library.arguments(config), compare(model, library, config, tensors)


def _of_own_code(model: Model, to: str) -> tuple[Mapping[str, Tensor], dict[str, Any], Parity]:
    libraries = model.config.libraries
    if to not in libraries:
        raise MoepruneError(
            f"the layers of the model are from {', '.join(libraries)}, not from `{to}`",
            f"give `--to {libraries[0]}`",
        )
    assert isinstance(model, AdoptedModel)
    if model.original is None:
        raise MoepruneError("it is not known what builds the model", "adopt it with the argument `factory`")
    original = model.original()
    tensors = to_module(model, original)
    if model.plan:
        parity = skipped("your code builds the unpruned model")
    else:
        load_foreign(original, tensors, "the exported tensors")
        parity = difference(model, original)
    return tensors, model.config.arguments, parity
