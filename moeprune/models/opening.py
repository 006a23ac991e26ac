"""Checkpoints into models."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from moeprune.data.datasets import Dataset
from moeprune.data.spec import DataSpec
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import Header, read_header, require_unchanged
from moeprune.models.description import read_description
from moeprune.models.model import Model, dataset_for, remember_fingerprint
from moeprune.models.spec import ModelSpec
from moeprune.models.tensors import load_strictly

logger = logging.getLogger(__name__)


def load(path: str | Path | Header, factory: str | None = None) -> Model:
    """Load a checkpoint that moeprune wrote, pruned or not: a model in eval mode on the CPU.

    The weights are memory-mapped from the file.

    Args:
        path: of the checkpoint, or its header.
        factory: `package.module:function` that builds the model, where it is of the user's own code.
            The checkpoint names it too, but only a caller can tell that it may be run.

    Raises:
        MoepruneError: the file is missing, damaged, of an unknown format, has no Soft MoE layer,
            lacks tensors or has others, or has NaN or infinite values; or the factory is missing or
            another one than the checkpoint names.
    """
    header = read_header(path)
    config, plan, details = read_description(header)
    fingerprint = checkpoint.fingerprint(header, config.to_json())
    try:
        model = config.build(plan, details, factory)
    except MoepruneError as error:
        raise MoepruneError(f"`{header.path}`: {error.message}", error.hint) from None
    load_strictly(model, checkpoint.read_tensors(header), header.path)
    require_unchanged(header)
    model = model.requires_grad_(False).eval()
    remember_fingerprint(model, fingerprint)
    return model


def open_model(spec: ModelSpec) -> Model:
    """Load a model with the preprocessing of the spec; warn if its results depend on the batch."""
    for option in ("source", "key", "input_shape", "arguments"):
        if getattr(spec, option):
            name = "--" + option.replace("_", "-")
            raise MoepruneError(f"`{name}` does not go with `{spec.path}`, a checkpoint of moeprune")
    model = load(spec.path, spec.model)
    parameters, layers = sum(t.numel() for t in model.state_dict().values()), len(model.config.moe_layers)
    logger.info(f"read `{spec.path}`: {parameters:,} parameters, {layers} MoE layer{'s' * (layers > 1)}")
    for name, layer in model.config.moe_layers.items():
        if layer.mixes_batch:
            logger.warning(
                f"layer `{name}` takes its dispatch softmax over the batch, as it was trained: results depend"
                " on `--batch-size` and on the order of the inputs"
            )
    if spec.preprocess:
        updated = model.details.preprocessing.updated(spec.preprocess)
        model.details = replace(model.details, preprocessing=updated)
    return model


def open_data_for(model: Model, spec: DataSpec, default_split: str) -> Dataset:
    """Open data for a model.

    Args:
        default_split: of a built-in data set whose split is not given.
    """
    data = dataset_for(model, spec.spec, default_split if spec.split is None else spec.split, spec.limit)
    logger.info(f"read `{data.spec}`: {data.samples} samples{'' if data.has_labels else ' without labels'}")
    return data
