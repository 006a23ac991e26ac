"""The model that a checkpoint describes, read from its header and checked; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from moeprune.data.preprocessing import Preprocessing
from moeprune.errors import MoepruneError
from moeprune.files.header import Header, is_safetensors, is_too_large, read_header, require_format
from moeprune.models.architecture import ModelConfig, architecture_from_json
from moeprune.models.tensors import lookalike, require_one_type, require_tensors
from moeprune.plan import Plan, plan_from_json, require_fitting_plan
from moeprune.records import Record, from_json

FORMAT = 1
"""The format of checkpoints."""


class Details(Record, frozen=True):
    """Preprocessing and origin of a model.

    source: where the weights came from: `library`, `version`, and for foreign files `sha256`.
    provenance: how they were made: training, or calibration data, seed and versions.
    """

    preprocessing: Preprocessing = Preprocessing()
    source: dict[str, Any] = msgspec.field(default_factory=dict)
    provenance: dict[str, Any] = msgspec.field(default_factory=dict)


def our_header(path: str | Path) -> Header | None:
    """Return the header of a file that moeprune wrote; None for files of other programs and folders.

    Raises:
        MoepruneError: there is no such file, or it is damaged.
    """
    header = read_header(path) if is_safetensors(Path(path)) else None
    return None if header is None or header.metadata is None else header


def read_description(header: Header) -> tuple[ModelConfig, Plan, Details]:
    """Return the architecture, plan and details of a checkpoint, after checking its tensors against them.

    Raises:
        MoepruneError: the file is not a checkpoint of moeprune, of an unknown format, or damaged; it has no
            MoE layer; or tensors are missing, unexpected, or of several types.
    """
    path = header.path
    config, plan, details = _read_metadata(header)
    found = config.known(header.tensors)
    shapes = config.shapes(plan)
    if any(is_too_large(shape) for shape in shapes.values()):
        raise MoepruneError(f"`{path}`: its architecture is too large to build a model")
    require_tensors(found, shapes, f"`{path}` does not fit its own architecture")
    require_one_type(found, path)
    return config, plan, details


def _read_metadata(header: Header) -> tuple[ModelConfig, Plan, Details]:
    path, metadata = header.path, header.metadata
    if metadata is None:
        raise MoepruneError(
            f"`{path}` is not a checkpoint of moeprune: {lookalike(header.tensors)}", "give one that moeprune wrote"
        )
    if metadata.get("kind") != "checkpoint":
        raise MoepruneError(
            f"`{path}` is not a checkpoint, but of kind {metadata.get('kind')!r}", "give the model's own file"
        )
    require_format(metadata, FORMAT, path)
    try:
        config = architecture_from_json(metadata.get("architecture"))
        plan = plan_from_json(metadata.get("plan", {}))
        require_fitting_plan(plan, config.moe_layers)
        _require_decided(plan)
        stated = {name: metadata[name] for name in Details.__struct_fields__ if name in metadata}
        details: Details = from_json(stated, Details, "metadata")
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    if not config.moe_layers:
        raise MoepruneError(f"no MoE layers in `{path}`", "there is nothing to prune in it")
    for name, moe in config.moe_layers.items():
        tokens = config.tokens(name)
        padded = moe.padded_tokens(tokens)
        if not tokens <= padded < tokens + moe.num_experts:
            raise MoepruneError(f"`{path}`: layer `{name}` computes with {padded} tokens, its inputs have {tokens}")
    return config, plan, details


def _require_decided(plan: Plan) -> None:
    """Raise a MoepruneError if the plan of a pruned layer leaves something open."""
    for name, layer in plan.items():
        open_fields = {
            "merged_into": layer.merges and layer.merged_into is None,
            "rank": layer.energy is not None,
            "kept": layer.scope == "static" and layer.kept is None,
        }
        if lacking := [f"`{field}`" for field, is_open in open_fields.items() if is_open]:
            raise MoepruneError(f"the plan of layer `{name}` lacks {', '.join(lacking)}")
