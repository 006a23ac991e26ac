"""Checkpoints of moeprune, of other libraries and of the user's own code, opened as models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.data.classes import require_names
from moeprune.data.datasets import Dataset
from moeprune.data.spec import DataSpec
from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.foreign import StateDict, read_state_dict
from moeprune.files.header import Header, require_unchanged
from moeprune.files.names import View, views
from moeprune.models.adopted import Factory, adopt, build, name_of, parse_source, skeleton
from moeprune.models.architecture import ModelConfig, ModuleConfig, ViTConfig
from moeprune.models.description import Details, our_header, read_description, with_options
from moeprune.models.language import open_language
from moeprune.models.libraries import is_anchor, library_of_file
from moeprune.models.libraries.layers import installed_version
from moeprune.models.libraries.soft_moe import Layout, SoftMoEViTs
from moeprune.models.loading import load_foreign, load_strictly, load_view, only, tensors_of, warn_of_dropped
from moeprune.models.model import Model, dataset_for, remember_fingerprint
from moeprune.models.parity import compare, difference, skipped, to_library
from moeprune.models.request import ModelSpec
from moeprune.models.results import Reading
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import Plan

logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    model: Factory | None = None,
    *,
    source: str | None = None,
    key: str | None = None,
    prefix: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    ignore_layers: Sequence[str] = (),
    class_names: Sequence[str] | os.PathLike[str] | None = None,
    offload: bool = False,
    **arguments: Any,
) -> Model:
    """Load a checkpoint of moeprune, of another library, or of your own code, on the CPU and in eval mode.

    Args:
        path: a file, or a folder with shards.
        model: the function that builds the model, or its name, `package.module:function` or
            `path/module.py:function`, if the model is your own code. A checkpoint names it too, but only a
            caller can allow that it is run.
        source: see ModelSpec, like key, prefix, input_shape, preprocess and arguments.
        ignore_layers: see `adopt`.
        class_names: of class folders, in the order of the outputs, or a text file with one a line; None: those in the
            checkpoint, if there are any.
        offload: keep the weights of a folder of transformers on disk: layers read theirs when they run.

    Raises:
        MoepruneError: the file is missing, damaged or unknown, has no MoE layer, lacks tensors or has
            others, or has NaN or infinite values; arguments are missing or wrong; or the model does not
            compute what the library's or your own does.
    """
    names_file = None
    if isinstance(class_names, str | os.PathLike):
        names_file, class_names = Path(class_names), None
    spec = ModelSpec(
        path=Path(path), model=name_of(model), source=source, key=key, prefix=prefix, input_shape=input_shape,
        preprocess=dict(preprocess or {}), ignore_layer=tuple(ignore_layers), classes=names_file,
        **{"source_arg" if model is None else "model_arg": arguments},
    )  # fmt: skip
    loaded = open_model(spec, model, offload=offload)
    if class_names is not None:
        require_names(class_names, loaded.config.num_classes, "`class_names`")
        loaded.details = loaded.details.replace(classes=tuple(class_names))
    return loaded


def opened(model: Model | str | os.PathLike[str], offload: bool = False) -> Model:
    """Return a model as it is, or load it from the path of a checkpoint; an error says what to do with others.

    offload: see `load`.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, str | os.PathLike):
        return load(model, offload=offload)
    hint = "give what `moeprune.load` returns, or `moeprune.adopt(model, input_shape)` for a module of torch"
    raise MoepruneError(f"`model` is a {type(model).__name__}, not a model of moeprune", hint)


def open_model(
    spec: ModelSpec, factory: Factory | None = None, header: Header | None = None, offload: bool = False
) -> Model:
    """Open a model on the CPU and in eval mode, see `load`; weights are memory-mapped if the file allows it.

    Args:
        factory: builds the model; None: the function that the spec names, if it names one.
        header: of the file, if it was read and is of moeprune.
        offload: see `load`.
    """
    factory = spec.model if factory is None else factory
    header = our_header(spec.path) if header is None else header
    spec.require_offloadable(offload)
    if header is not None:
        if spec.foreign_only:
            raise MoepruneError(
                f"`{spec.path}` is a checkpoint of moeprune and takes no `{'`, `'.join(spec.foreign_only)}`",
                "leave it out: the checkpoint contains it",
            )
        model = _open_ours(header, factory)
    elif factory is None and spec.is_model_folder:
        if spec.preprocess:
            raise MoepruneError(f"`--preprocess` is of images, and `{spec.path}` a language model", "leave it out")
        model = open_language(spec.path, offload)
    elif factory is None:
        model = _open_library(spec)
    else:
        model = _open_module(spec, factory)
    parameters, layers = sum(tensor.numel() for tensor in model.state_dict().values()), model.config.moe_layers
    logger.info(f"read `{spec.path}`: {parameters:,} parameters, {len(layers)} MoE layer{'s' * (len(layers) > 1)}")
    for name, layer in layers.items():
        if layer.mixes_batch:
            logger.warning(
                f"layer `{name}` takes its dispatch softmax over the batch, as it was trained: results depend"
                " on `--batch-size` and on the order of the inputs"
            )
    model.details = with_options(model.details, spec, model.config.num_classes)
    return model.requires_grad_(False).eval()


def open_data_for(
    model: Model, spec: DataSpec, default_split: str, class_names: tuple[str, ...] = (), by: str | None = None
) -> Dataset:
    """Open data for a model.

    default_split: of a built-in data set whose split is not given. class_names: of an analysis, see `dataset_for`.
    by: the field that names the group of a text.
    """
    split = default_split if spec.split is None else spec.split
    data = dataset_for(model, spec.spec, split, spec.limit, class_names, spec.sequence_length, by)
    labels = "" if data.has_labels or isinstance(model.input_format, TokenFormat) else " without labels"
    logger.info(f"read `{data.spec}`: {data.samples} samples{labels}")
    return data


def specs_of(stated: ModelSpec, *paths: Path) -> list[ModelSpec]:
    """Return the specs of several checkpoints of one model, such as a pruned one and its baseline.

    If only some of the files are from other programs, options that only those need are dropped for the rest.
    """
    ours = {path for path in paths if our_header(path)}
    plain = ModelSpec(path=stated.path, model=stated.model, preprocess=stated.preprocess, classes=stated.classes)
    is_mixed = 0 < len(ours) < len(set(paths))
    return [(plain if is_mixed and path in ours else stated).replace(path=path) for path in paths]


def _open_ours(header: Header, factory: Factory | None) -> Model:
    config, plan, details = read_description(header)
    fingerprint = checkpoint.fingerprint(header, config.to_json())
    try:
        model = _build(config, plan, details, factory)
    except MoepruneError as error:
        raise MoepruneError(f"`{header.path}`: {error.message}", error.hint) from None
    load_strictly(model, checkpoint.read_tensors(header), header.path)
    require_unchanged(header)
    remember_fingerprint(model, fingerprint)
    return model


def _build(config: ModelConfig, plan: Plan, details: Details, factory: Factory | None) -> Model:
    """Return the model without weights, its MoE layers on the meta device."""
    if isinstance(config, ModuleConfig):
        return skeleton(config, plan, details, factory)
    if factory is not None:
        raise MoepruneError("its architecture is in the file: it needs no `--model`", "omit `--model`")
    assert isinstance(config, ViTConfig)
    with torch.device("meta"):
        return SoftMoEViT(config, plan, details)


def _open_library(spec: ModelSpec) -> Model:
    """Open a whole model of a library."""
    if spec.input_shape is not None or spec.model_arg or spec.ignore_layer:
        raise MoepruneError(
            "`--input-shape`, `--model-arg` and `--ignore-layer` go with `--model`",
            "name the function that builds the model",
        )
    found = read_state_dict(spec.path, spec.key)
    view, library, layout = _read_library(spec, found)
    tensors = tensors_of(found, view)
    if spec.prefix is None:
        warn_of_dropped(view, spec.path)
    checkpoint.check_finite({k: t for k, t in tensors.items() if k not in layout.dropped}, spec.path)
    model = _build(layout.config, {}, Details(source=_source({library.name: None}, found)), None)
    model.load_state_dict(_to_ours(tensors, layout), assign=True)
    model.requires_grad_(False).eval()
    if refused := library.refusals(layout.config):
        parity = skipped(f"{library.model_class} cannot express it: {'; '.join(refused)}")
    else:
        is_theirs = layout.entries == library.entries(layout.config) and not layout.dropped
        own = tensors if is_theirs else to_library(model, layout.config, library)
        parity = compare(model, library, layout.config, own)
    model.reading = Reading(
        library=library.name, arguments=layout.arguments, defaults=layout.defaults, prefix=view.prefix,
        wrappers=view.wrappers, dropped=[*layout.dropped, *view.dropped], parity=parity,
    )  # fmt: skip
    return model


def _read_library(spec: ModelSpec, found: StateDict) -> tuple[View, SoftMoEViTs, Layout]:
    """Return the view of a whole model of a library in a file, and how the library lays it out."""
    read, errors = {}, []
    options = views(list(found.tensors), is_anchor, 1, spec.prefix, spec.path)
    for index, view in enumerate(options):
        infos = checkpoint.tensor_infos(tensors_of(found, view))
        try:
            library = library_of_file(infos, str(spec.path), spec.source)
            read[index] = library, library.read(infos, spec.source_arg, str(spec.path))
        except MoepruneError as error:
            errors.append(error)
    if not read:
        raise errors[0]
    view = only([options[index] for index in read], found, spec.path)
    return view, *read[options.index(view)]


def _to_ours(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the state dict of our model for that of a library's own model."""
    shapes = layout.config.shapes({})
    ours = {}
    for entry in layout.entries:
        parts = [tensors[name] for name in entry.theirs]
        tensor = torch.stack(parts) if entry.split else parts[0]
        tensor = tensor.mT if entry.transposed else tensor
        ours[entry.ours] = tensor.reshape(shapes[entry.ours]).contiguous()
    return ours


def _open_module(spec: ModelSpec, factory: Factory) -> Model:
    """Open a model of the user's own code."""
    if spec.input_shape is None:
        raise MoepruneError(
            "a model of your own code needs `input_shape`, the shape of one input",
            "give channels, height and width: `--input-shape 3,224,224`",
        )
    found = read_state_dict(spec.path, spec.key)
    module = build(factory, spec.model_arg, spec.input_shape)
    view = load_foreign(module, found, spec.path, spec.prefix)
    if spec.prefix is None:
        warn_of_dropped(view, spec.path)
    checkpoint.check_finite(tensors_of(found, view), spec.path)
    model = adopt(module, spec.input_shape, factory, spec.model_arg, spec.source, spec.ignore_layer)
    libraries = dict.fromkeys(model.config.libraries) | parse_source(spec.source)
    model.details = Details(source=_source(libraries, found))
    parity, again = None, build(factory, spec.model_arg, spec.input_shape)
    load_view(again, found, view)
    for name, release in parse_source(spec.source).items():
        if release is not None and (installed := installed_version(name)) != release:
            parity = skipped(f"`{name}` {installed} is installed, not {release}")
    model.reading = Reading(
        library=", ".join(libraries), arguments=spec.model_arg, defaults={}, prefix=view.prefix,
        wrappers=view.wrappers, dropped=view.dropped,
        parity=parity or difference(model, again, "your own model"),
    )  # fmt: skip
    return model


def _source(libraries: Mapping[str, str | None], found: StateDict) -> dict[str, str]:
    """Return the origin of weights, for `Details.source`, given libraries and the releases that the user states."""
    versions = [release or installed_version(name) or "unknown" for name, release in libraries.items()]
    return {"library": ", ".join(libraries), "version": ", ".join(versions), "sha256": found.sha256()}
