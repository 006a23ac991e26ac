"""What calibration data says of every MoE layer of a model, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune import __version__
from moeprune.calibration.passes import divergences, measure, require_finite
from moeprune.calibration.statistics import (
    LayerStatistics,
    StatisticsAccumulator,
)
from moeprune.calibration.sums import sums_in_bytes
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import read_header, require_format
from moeprune.layers.interface import LayerConfig
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan
from moeprune.records import to_json

FORMAT = 1
PROBE_INPUTS = 256
WORKSPACE = 2 << 30
"""Bytes of sums over inputs that an analysis holds at once."""


@dataclass(frozen=True)
class Analysis:
    """The statistics of a model's Soft MoE layers by name, and what they were made from.

    provenance: `checkpoint` (fingerprint), `data` (spec, samples, fingerprint), `moeprune` (version).
    """

    layers: dict[str, LayerStatistics]
    provenance: dict[str, Any]


def analyze(model: Model, data: Dataset | str, runtime: Runtime = Runtime()) -> Analysis:
    """Statistics of every Soft MoE layer of an unpruned model, from a pass over the data.

    Memory does not depend on the number of samples, nor the result on the batch size (beyond
    rounding). Where the sums of all layers take more than WORKSPACE, there are several passes, each for
    some of the layers.

    Raises:
        MoepruneError: no Soft MoE layer, a pruned one, or data that does not fit the model.
    """
    layers = require_dense_layers(model, "analyze the unpruned checkpoint")
    model_fingerprint = fingerprint(model)
    model = private_copy(model)
    data = dataset_for(model, data, split="calibration")
    statistics: dict[str, LayerStatistics] = {}
    fingerprints = set()
    for names in _groups({name: sums_in_bytes(layer, "affine") for name, layer in layers.items()}):
        accumulators = measure(model, names, data, runtime, "analyze", StatisticsAccumulator)
        statistics |= {name: accumulator.result() for name, accumulator in accumulators.items()}
        del accumulators  # before the next sums are made
        fingerprints.add(data.fingerprint)
    if len(fingerprints) > 1:
        raise MoepruneError(f"`{data.spec}` changed while it was read", "try again")
    require_finite(statistics, data)
    sensitivities = measure_sensitivity(model, statistics, data, runtime)
    statistics = {
        name: replace(layer, sensitivity=sensitivities.get(name, layer.sensitivity))
        for name, layer in statistics.items()
    }
    provenance = {
        "checkpoint": {"fingerprint": model_fingerprint},
        "data": to_json(data.info),
        "moeprune": __version__,
    }
    return Analysis(statistics, provenance)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Layers in their order, as many at a time as fit into the workspace, but one at least."""
    groups: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not groups or size > left:
            groups.append([])
            left = WORKSPACE
        groups[-1].append(name)
        left -= size
    return groups


def measure_sensitivity(
    model: Model, statistics: Mapping[str, LayerStatistics], data: Dataset, runtime: Runtime
) -> dict[str, Tensor]:
    """How much the output of a model changes for each unit of squared error in a layer's (scalars).

    Each layer is pruned by itself, to an eighth of its experts with `mean`, and the mean divergence of the
    predictions from the unpruned model's, in nats, is divided by the layer's error, which the Gram matrix
    tells. Without a head, the change of the features takes the divergence's place. Layers that cannot be
    pruned statically are left out.

    Args:
        model: a private copy of the unpruned one, on the runtime's device.
        statistics: of all its layers.
        data: PROBE_INPUTS of it are used, drawn with a fixed seed.
        runtime: where and how models run.
    """
    probes, errors = {}, {}
    for name, layer in model.moe_layers.items():
        if "static" not in layer.config.scopes:
            continue
        n = layer.config.num_experts
        kept = statistics[name].best_kept(n // 8, "mean")
        plan = LayerPlan("static", n // 8, n, "gram", "mean", kept)
        errors[name] = statistics[name].gram_mean.double()[list(plan.dropped)][:, list(plan.dropped)].sum()
        probes[name] = private_copy(model)
        probe = prune_layer(layer, plan, Calibrated(term_mean=statistics[name].term_mean))
        probes[name].set_submodule(name, probe)
    changes = divergences(probes, model, data.sample(PROBE_INPUTS), runtime, "probe layers")
    tiny = torch.finfo(torch.float32).tiny
    return {name: (change / errors[name].clamp_min(tiny)).float() for name, change in changes.items()}


def save_analysis(analysis: Analysis, path: str | Path, overwrite: bool = True) -> None:
    """Write an analysis file: equal analyses give equal bytes.

    Raises:
        MoepruneError: the path cannot be written, or exists and may not be replaced.
    """
    tensors = {
        f"{name}.{field.name}": getattr(statistics, field.name)
        for name, statistics in analysis.layers.items()
        for field in fields(statistics)
    }
    metadata = {
        "format": FORMAT,
        "kind": "analysis",
        "layers": list(analysis.layers),
        "provenance": analysis.provenance,
    }
    checkpoint.write(path, tensors, metadata, overwrite)


def load_analysis(path: str | Path) -> Analysis:
    """Read an analysis file.

    Raises:
        MoepruneError: it is missing, damaged, no analysis, or of an unknown format.
    """
    header = read_header(path)
    metadata = header.metadata or {}
    if metadata.get("kind") != "analysis":
        raise MoepruneError(f"`{path}` is no analysis", "write one with `moeprune analyze`")
    require_format(metadata, FORMAT, path)
    tensors = checkpoint.read_tensors(header)
    try:
        layers = {
            name: LayerStatistics(
                **{field.name: tensors[f"{name}.{field.name}"] for field in fields(LayerStatistics)}
            )
            for name in metadata["layers"]
        }
        provenance = metadata["provenance"]
        made_from, made_for = provenance["data"], provenance["checkpoint"]
    except (KeyError, TypeError) as error:
        raise MoepruneError(f"`{path}` lacks {error}", "write it again with `moeprune analyze`") from None
    if not isinstance(made_from, Mapping) or not isinstance(made_for, Mapping):
        raise MoepruneError(f"`{path}`: `data` or `checkpoint` of its provenance is no object")
    texts = made_for.get("fingerprint"), *(made_from.get(key) for key in ("spec", "fingerprint"))
    samples = made_from.get("samples")
    if not all(isinstance(text, str) for text in texts) or type(samples) is not int or samples < 1:
        raise MoepruneError(
            f"`{path}`: its checkpoint's `fingerprint`, or `spec`, `fingerprint` or `samples` of its data,"
            " is missing or damaged"
        )
    for name, layer in layers.items():
        _require_consistent(layer, name, path)
    checkpoint.check_finite(tensors, path)
    return Analysis(layers, provenance)


def _require_consistent(layer: LayerStatistics, name: str, path: str | Path) -> None:
    n, p, d = (*layer.term_mean.shape, 0, 0, 0)[:3]
    shapes = {
        "mean_mass": (n,), "max_mass": (n,), "rank_frequency": (n, n), "kept_mass": (n,),
        "experts_for_mass": (3,), "class_mass": (len(layer.class_mass), n),
        "term_mean": (n, p, d), "deviation": (n,),
        "sensitivity": (),
        **dict.fromkeys(("gram", "gram_renorm", "gram_mean", "gram_lstsq", "gram_affine"), (n, n)),
    }  # fmt: skip
    for key, shape in shapes.items():
        tensor = getattr(layer, key)
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise MoepruneError(
                f"`{path}`: `{name}.{key}` is {tensor.dtype} {list(tensor.shape)}, expected {list(shape)}",
                "write it again with `moeprune analyze`",
            )


def require_analysis_of(
    layers: Mapping[str, LayerConfig], fingerprint: str, analysis: Analysis | None
) -> None:
    """Raise a MoepruneError if the analysis was made for a checkpoint of another fingerprint, or damaged.

    Args:
        layers: of the unpruned checkpoint. fingerprint: of the same. analysis: None is right for any.
    """
    if analysis is None:
        return
    found = analysis.provenance["checkpoint"]["fingerprint"]
    if found != fingerprint:
        raise MoepruneError(
            f"the analysis was made for another checkpoint (fingerprint {found[:12]}…, this one has"
            f" {fingerprint[:12]}…)",
            "run `moeprune analyze` on this checkpoint",
        )
    for name, layer in layers.items():
        expected_shape = [layer.num_experts, layer.terms_per_expert, layer.output_width]
        shape = list(analysis.layers[name].term_mean.shape) if name in analysis.layers else None
        if shape != expected_shape:
            raise MoepruneError(
                f"the analysis does not fit: `{name}.term_mean` is {shape}, expected {expected_shape}",
                "write it again with `moeprune analyze`",
            )
