"""Static pruning in one shot, from file to file: no model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.calibration.analysis import Analysis
from moeprune.data.preprocessing import Preprocessing
from moeprune.files import checkpoint
from moeprune.files.checkpoint import Copied
from moeprune.files.header import Header, read_header
from moeprune.layers.surgery import prune_tensors
from moeprune.models.description import read_description
from moeprune.models.model import require_unpruned
from moeprune.models.runtime import Runtime
from moeprune.plan import Method, Plan
from moeprune.pruning.apply import (
    ALREADY_PRUNED,
    calibrated,
    choose_experts,
    full_plan,
    provenance,
    require_calibration,
)
from moeprune.records import to_json


def prune_file(
    source: str | Path | Header,
    target: str | Path,
    analysis: Analysis | None = None,
    *,
    keep: str | float | Fraction | None = None,
    plan: Plan | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    overwrite: bool = True,
    **method: Any,
) -> None:
    """Prune a checkpoint statically in one shot, from file to file: the memory it takes is small.

    Writes what `moeprune.save(prune(load(source), ..., one_shot=True), target)` writes, see
    moeprune.pruning.apply.prune. The factory of a model of the user's own code is not needed.

    Args:
        source: an unpruned checkpoint, or its header.
        plan: of scope static only.
        preprocessing: in place of the checkpoint's.
        method: `signal` and `compensate`, of `none`, `renorm` and `mean`.

    Raises:
        MoepruneError: the source is damaged or pruned, the analysis another's, or the output not writable.
    """
    header = read_header(source)
    config, existing, details = read_description(header)
    require_unpruned(existing, ALREADY_PRUNED)
    plan = full_plan(config.moe_layers, keep, plan, Method(**method))
    source_fingerprint = checkpoint.fingerprint(header, config.to_json())
    analysis = require_calibration(plan, config.moe_layers, source_fingerprint, analysis, has_data=False, one_shot=True)
    tensors = checkpoint.read_tensors(header)
    entries: dict[str, Tensor | Copied] = {name: Copied(header, name) for name in header.tensors}
    for index, (name, layer_plan) in enumerate(plan.items()):
        moments = None if analysis is None else analysis.layers[name]
        plan[name] = choose_experts(layer_plan, moments, None, seed, index)
        take = partial(_take, header, tensors, name)
        found = prune_tensors(config.moe_layers[name], plan[name], take, calibrated(plan[name], moments, seed, index))
        dtype = tensors[f"{name}.fc2_weight"].dtype
        for key, tensor in found.items():
            entries[f"{name}.{key}"] = tensor.to(dtype) if isinstance(tensor, Tensor) else tensor
    made = provenance(source_fingerprint, plan, analysis, None, seed, Runtime())
    assert header.metadata is not None
    metadata = header.metadata | {"plan": to_json(plan), "provenance": details.provenance | made}
    if preprocessing is not None:
        metadata["preprocessing"] = to_json(preprocessing)
    checkpoint.write(target, entries, metadata, overwrite)


def _take(
    header: Header, tensors: Mapping[str, Tensor], layer: str, name: str, axis: int | None, experts: Sequence[int]
) -> Tensor | Copied:
    """Return a tensor of a layer of a file, or the places of experts along an axis: bytes to copy if they may be."""
    if axis:
        return tensors[f"{layer}.{name}"].index_select(axis, torch.tensor(experts))
    return Copied(header, f"{layer}.{name}", None if axis is None else experts)
