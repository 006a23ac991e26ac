"""What a checkpoint says about its model, read from its header alone and checked; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeprune.data.preprocessing import Preprocessing, preprocessing_from_json
from moeprune.errors import MoepruneError
from moeprune.files.header import Header, is_too_large, require_format
from moeprune.models.architecture import ModuleConfig, ViTConfig, module_from_json, vit_from_json
from moeprune.models.flops import tokens_of
from moeprune.models.libraries import not_ours
from moeprune.models.tensors import layer_shapes, require_one_type, require_tensors, tensor_shapes
from moeprune.plan import Plan, plan_from_json, require_fitting_plan

FORMAT = 1


@dataclass(frozen=True)
class Details:
    """What a checkpoint says beside its tensors, architecture and plan.

    source: where the weights came from: `library`, `version`, and for converted files `sha256`.
    provenance: how they were made: training, or calibration data, seed and versions.
    """

    preprocessing: Preprocessing = Preprocessing()
    source: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def read_description(header: Header) -> tuple[ViTConfig | ModuleConfig, Plan, Details]:
    """The architecture, plan and details of a checkpoint, which its tensors fit.

    Of a model of the user's own code, only the tensors of Soft MoE layers are known beforehand.

    Raises:
        MoepruneError: the file is no checkpoint of moeprune, or of an unknown format, or damaged, or
            has no Soft MoE layer, or lacks tensors, or has others or such of several types.
    """
    path = header.path
    config, plan, details = _read_metadata(header)
    found = header.tensors
    if isinstance(config, ViTConfig):
        if len(config.blocks) > len(found):
            raise MoepruneError(f"`{path}`: {len(config.blocks)} blocks, but {len(found)} tensors")
        shapes = tensor_shapes(config, plan)
    else:
        shapes = layer_shapes(config, plan)
        found = {name: tensor for name, tensor in found.items() if name.rpartition(".")[0] in config.layers}
    if any(is_too_large(shape) for shape in shapes.values()):
        raise MoepruneError(f"`{path}`: no model can be built of its architecture")
    require_tensors(found, shapes, path)
    require_one_type(found, path)
    return config, plan, details


def _read_metadata(header: Header) -> tuple[ViTConfig | ModuleConfig, Plan, Details]:
    path, metadata = header.path, header.metadata
    if metadata is None:
        raise not_ours(header.tensors, str(path))
    if metadata.get("kind") != "checkpoint":
        raise MoepruneError(
            f"`{path}` is no checkpoint but of kind {metadata.get('kind')!r}", "give the model's own file"
        )
    require_format(metadata, FORMAT, path)
    try:
        architecture = metadata.get("architecture")
        is_module = isinstance(architecture, dict) and architecture.get("type") == "module"
        config = module_from_json(architecture) if is_module else vit_from_json(architecture)
        plan = plan_from_json(metadata.get("plan", {}))
        require_fitting_plan(plan, config.moe_layers)
        preprocessing = preprocessing_from_json(metadata.get("preprocessing", {}))
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    if not config.moe_layers:
        raise MoepruneError(f"no Soft MoE layers in `{path}`", "there is nothing to prune in it")
    for name, moe in config.moe_layers.items():
        tokens = tokens_of(config, name)
        slots = -(-tokens // moe.num_experts)  # rounded up, also where a damaged file has endless tokens
        if moe.dynamic_slots and moe.slots_per_expert != slots:
            raise MoepruneError(
                f"`{path}`: layer `{name}` has {moe.slots_per_expert} dynamic slots per expert, expected"
                f" {slots}: {tokens} tokens for {moe.num_experts} experts"
            )
    for name, layer in plan.items():
        if layer.merges and layer.merged_into is None:
            raise MoepruneError(f"`{path}`: the plan of layer `{name}` lacks `merged_into`")
        if layer.energy is not None:
            raise MoepruneError(f"`{path}`: the plan of layer `{name}` leaves its `rank` open")
        if layer.scope == "static" and layer.kept is None:
            raise MoepruneError(f"`{path}`: the plan of layer `{name}` lacks `kept`")
    for key in ("source", "provenance"):
        if not isinstance(metadata.get(key, {}), dict):
            raise MoepruneError(f"`{path}`: `{key}` is no object")
    details = Details(preprocessing, metadata.get("source", {}), metadata.get("provenance", {}))
    return config, plan, details
