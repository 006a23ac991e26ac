"""Plans as files: JSON that people read and edit, and what prune's report and checkpoints say; no torch.

    {"schema_version": 1, "plan": {"blocks.1.soft_moe": {"scope": "static", "k": 8, "compensation": "mean"}}}

Of a layer, `k` or `kept` is needed; the rest has defaults. Where a static layer's `kept` is missing or null,
its signal chooses the experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.files.header import MAX_LENGTH, read_header, require_file
from moeprune.files.writing import write_text
from moeprune.plan import Plan, plan_from_json, plan_to_json, require_fitting_plan

SCHEMA_VERSION = 1
DEFAULTS = {"scope": "static", "signal": "combine", "compensation": "none"}


def write_plan(plan: Plan, path: str | Path, overwrite: bool = True) -> None:
    """Write a plan as JSON, a line for each layer: equal plans give equal bytes.

    Raises:
        MoepruneError: the path cannot be written, or exists and may not be replaced.
    """
    layers = [f"    {json.dumps(name)}: {json.dumps(layer)}" for name, layer in plan_to_json(plan).items()]
    lines = ["{", f'  "schema_version": {SCHEMA_VERSION},', '  "plan": {', ",\n".join(layers), "  }", "}"]
    write_text(Path(path), "\n".join(lines) + "\n", overwrite)


def read_plan(path: str | Path, layers: Mapping[str, Any]) -> Plan:
    """The plan of a JSON file, or of a checkpoint that was pruned.

    Args:
        path: of the file.
        layers: of the model that it is for; see moeprune.plan.require_fitting_plan.

    Raises:
        MoepruneError: the file is missing, no plan, or does not fit the layers.
    """
    path = Path(path)
    value = _of_checkpoint(path) if path.suffix == ".safetensors" else _of_json(path)
    if not isinstance(value, Mapping) or not value:
        raise MoepruneError(f"`{path}` has no plan of any layer", "give what `--save-plan` or `prune` wrote")
    try:
        plan = plan_from_json({name: _completed(layer, name, layers) for name, layer in value.items()})
        require_fitting_plan(plan, layers)
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    return plan


def _of_checkpoint(path: Path) -> Any:
    metadata = read_header(path).metadata or {}
    if not metadata.get("plan"):
        raise MoepruneError(f"`{path}` is no pruned checkpoint", "give one, or a plan as JSON")
    return metadata["plan"]


def _of_json(path: Path) -> Any:
    require_file(path, "a plan as JSON, or a checkpoint that was pruned")
    try:
        if path.stat().st_size > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoepruneError(f"cannot read `{path}` ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}` is no JSON ({error})") from None
    version = found.get("schema_version") if isinstance(found, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise MoepruneError(
            f"`{path}`: `schema_version` is {version!r}, expected {SCHEMA_VERSION}",
            'a plan is {"schema_version": 1, "plan": {"LAYER": {"k": 8, ...}}}',
        )
    if spare := [key for key in found if key not in ("schema_version", "plan")]:
        raise MoepruneError(f"`{path}`: unknown key `{spare[0]}`", "a plan has `schema_version` and `plan`")
    return found.get("plan")


def _completed(layer: Any, name: str, layers: Mapping[str, Any]) -> Any:
    """What a layer's plan says, with defaults where it says nothing."""
    if not isinstance(layer, Mapping):
        raise MoepruneError(f"plan of `{name}`: found {type(layer).__name__}, expected an object")
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
