"""Plans as files: JSON that people read and edit.

    {"schema_version": 1, "plan": {"blocks.1.soft_moe": {"scope": "static", "k": 8, "compensation": "mean"}}}

A layer needs `k` or `kept`; the rest has defaults. Where a static layer's `kept` is missing or null, its
signal chooses the experts.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import TORCH_SUFFIXES
from moeprune.files.disk import read_json, write_file
from moeprune.files.header import read_header
from moeprune.layers.interface import LayerConfig
from moeprune.models.description import our_header
from moeprune.models.folders.layout import PLAN
from moeprune.plan import Plan, plan_from_json, require_fitting_plan
from moeprune.records import to_json

SCHEMA_VERSION = 1
DEFAULTS = {"scope": "static", "signal": "combine", "compensation": "none"}


def write_plan(plan: Plan, path: str | Path, overwrite: bool = True) -> None:
    """Write a plan as JSON, a line for each layer: equal plans give equal bytes."""
    layers = [f"    {json.dumps(name)}: {json.dumps(layer)}" for name, layer in to_json(plan).items()]
    lines = ["{", f'  "schema_version": {SCHEMA_VERSION},', '  "plan": {', ",\n".join(layers), "  }", "}"]
    write_file(Path(path), "\n".join(lines) + "\n", overwrite)


def read_plan(path: str | Path, layers: Mapping[str, LayerConfig]) -> Plan:
    """Read the plan of a JSON file or a pruned checkpoint, or raise a MoepruneError if it does not fit the layers."""
    path = Path(path)
    if os.path.isfile(path / PLAN):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        path /= PLAN
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        header = read_header(path) if path.suffix == ".safetensors" else our_header(path)
        value = ((header and header.metadata) or {}).get("plan")
        if not value:
            raise MoepruneError(f"`{path}` is not a pruned checkpoint", "give one, or a plan as JSON")
    else:
        found = read_json(path, "a plan as JSON, or a pruned checkpoint")
        version = found.get("schema_version") if isinstance(found, dict) else None
        if type(version) is not int or version != SCHEMA_VERSION:
            raise MoepruneError(
                f"`{path}`: `schema_version` is {version!r}, expected {SCHEMA_VERSION}",
                'a plan is {"schema_version": 1, "plan": {"LAYER": {"k": 8, ...}}}',
            )
        if unknown := [key for key in found if key not in ("schema_version", "plan", "provenance")]:
            raise MoepruneError(f"`{path}`: unknown key `{unknown[0]}`", "the keys are `schema_version` and `plan`")
        value = found.get("plan")
    if not isinstance(value, Mapping) or not value:
        raise MoepruneError(f"`{path}` plans no layer", "give what `--save-plan` or `prune` wrote")
    try:
        plan = plan_from_json({name: _complete(layer, name, layers) for name, layer in value.items()})
        require_fitting_plan(plan, layers)
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    return plan


def _complete(layer: Any, name: str, layers: Mapping[str, LayerConfig]) -> Any:
    """Return a layer's plan with defaults for what it leaves out."""
    if not isinstance(layer, Mapping):
        return layer
    layer = {**DEFAULTS, **layer}
    if name in layers:
        layer.setdefault("num_experts", layers[name].num_experts)
    kept = layer.get("kept")
    if isinstance(kept, list):
        layer.setdefault("k", len(kept))
        if all(type(j) is int for j in kept):
            layer["kept"] = sorted(kept)
    if "k" not in layer:
        raise MoepruneError(f"plan of `{name}`: `k` or `kept` is missing", "say how many experts, or which")
    return layer
