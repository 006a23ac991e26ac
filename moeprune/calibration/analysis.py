"""The statistics of all MoE layers of a model on calibration data, and the file that holds them."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moeprune import __version__
from moeprune.calibration.changes import changes
from moeprune.calibration.probes import probe, probe_inputs
from moeprune.calibration.results import AnalysisReport, AnalyzeRequest
from moeprune.calibration.statistics import AXES, MASS_LEVELS, LayerStatistics, measure_layer, require_finite, summarize
from moeprune.calibration.walk import Walk
from moeprune.data.datasets import Data, Dataset
from moeprune.data.leakage import warn_of_calibration_split
from moeprune.data.spec import DataInfo
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import read_header, require_format
from moeprune.layers.interface import LayerConfig
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.opening import open_data_for, open_model, opened
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan
from moeprune.records import Record, from_json, to_json

logger = logging.getLogger(__name__)
FORMAT = 2


class Origin(Record, frozen=True, omit_defaults=False):
    """The origin of an analysis.

    checkpoint: fingerprint of the unpruned model. moeprune: version. classes: names of class folders, in the order of
    the labels; empty for other data. sequence_length: tokens of each sequence that text was packed into.
    """

    checkpoint: str
    data: DataInfo
    moeprune: str
    classes: tuple[str, ...] = ()
    sequence_length: int | None = None


@dataclass(frozen=True)
class Analysis:
    """The statistics of a model's MoE layers by name, and what they were made from.

    data: that was read, unless the analysis is from a file. folder: of that file.
    """

    layers: dict[str, LayerStatistics]
    origin: Origin
    data: Dataset | None = field(default=None, compare=False, repr=False)
    folder: Path | None = field(default=None, compare=False)


class _Metadata(Record, frozen=True, omit_defaults=False):
    kind: Literal["analysis"]
    format: int
    layers: tuple[str, ...]
    origin: Origin


def analyze_checkpoint(request: AnalyzeRequest) -> tuple[AnalysisReport, Model, Analysis]:
    """Analyze a model and write the analysis; return the report, and the model and analysis that it is about.

    Raises a MoepruneError if an input cannot be read or does not fit, or the output cannot be written.
    """
    request.runtime.require_device()
    model = open_model(request.checkpoint, offload=request.runtime.offload)
    data = open_data_for(model, request.data, "calibration")
    analysis = analyze(model, data, request.runtime)
    configs = model.config.moe_layers
    together, alone = probe(model, analysis.layers, data, request.runtime)
    layers = {
        name: summarize(statistics, configs[name].scopes, alone[name]) for name, statistics in analysis.layers.items()
    }
    for name, layer in layers.items():
        if layer.experts == 1:
            logger.warning(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot represent"
                " some simple convex functions, however large the expert is (Chung et al. 2024, Theorem 1):"
                " train with many small experts"
            )
    save_analysis(analysis, request.output, request.overwrite)
    report = AnalysisReport(str(request.checkpoint.path), str(request.output), data.info, layers, together)
    return report, model, analysis


def analyze(
    model: Model | str | os.PathLike[str],
    data: Data,
    runtime: Runtime = Runtime(),
    *,
    device: str | None = None,
    batch_size: int | None = None,
) -> Analysis:
    """Compute the statistics of every MoE layer of an unpruned model, in a pass over the data.

    The result does not depend on the batch size, beyond rounding.

    Args:
        model: of moeprune, or its file.
        data: see moeprune.data.datasets and moeprune.data.samples; the analysis keeps it, a file of the analysis its
            spec.
        device, batch_size: replace those of the runtime.

    Raises a MoepruneError if there is no MoE layer or a pruned one, or the data does not fit the model.
    """
    model, runtime = opened(model, runtime.offload), runtime.updated(device, batch_size)
    layers = require_dense_layers(model, "analyze the unpruned checkpoint")
    origin = fingerprint(model)
    model = private_copy(model)
    data = dataset_for(model, data, split="calibration")
    warn_of_calibration_split(data)
    model.to(runtime.torch_device)
    statistics: dict[str, LayerStatistics] = {}
    with Walk(model, None, data, runtime) as walk:
        for name in layers:
            statistics[name] = measure_layer(walk, name)
            require_finite(name, statistics[name])
    for name, sensitivity in measure_sensitivity(model, statistics, data, runtime).items():
        statistics[name] = replace(statistics[name], sensitivity=sensitivity)
    length = None if data.source.texts is None else data.source.texts.length
    return Analysis(statistics, Origin(origin, data.info, __version__, data.source.class_names, length), data)


def measure_sensitivity(
    model: Model, statistics: Mapping[str, LayerStatistics], data: Dataset, runtime: Runtime
) -> dict[str, Tensor]:
    """Measure how much a model's output changes for each unit of squared error in a layer's (scalars).

    Each layer is pruned by itself, to an eighth of its experts with `mean`, and the mean divergence of
    predictions of some inputs is divided by the layer's error, which the Gram matrix tells. Layers that cannot
    be pruned statically are left out. The model is a private copy on the runtime's device.
    """
    probes, errors = {}, {}
    for name, layer in model.moe_layers.items():
        if "static" not in layer.config.scopes:
            continue
        n = layer.config.num_experts
        plan = LayerPlan("static", n // 8, n, "gram", "mean", statistics[name].best_kept(n // 8, "mean"))
        dropped = list(plan.dropped)
        error = statistics[name].gram_mean.double()[dropped][:, dropped].sum()
        errors[name] = error.clamp_min(torch.finfo(torch.float32).tiny)
        probes[name] = private_copy(model)
        probes[name].set_submodule(name, prune_layer(layer, plan, Calibrated(term_mean=statistics[name].term_mean)))
    found = changes(probes, model, data.sample(probe_inputs(model)), runtime, "probe layers")
    return {name: (change.divergence / errors[name]).float() for name, change in found.items()}


def save_analysis(analysis: Analysis, path: str | Path, overwrite: bool = False) -> None:
    """Write an analysis file: equal analyses give equal bytes.

    Raises a MoepruneError if the path cannot be written, or exists and may not be replaced.
    """
    tensors = {
        f"{name}.{field.name}": getattr(statistics, field.name)
        for name, statistics in analysis.layers.items()
        for field in fields(statistics)
    }
    metadata = _Metadata("analysis", FORMAT, tuple(analysis.layers), analysis.origin)
    checkpoint.write(path, tensors, to_json(metadata), overwrite)


def load_analysis(path: str | Path) -> Analysis:
    """Read an analysis file; raise a MoepruneError if it is missing, damaged, or not an analysis of this format."""
    header = read_header(path)
    found = header.metadata or {}
    if found.get("kind") != "analysis":
        raise MoepruneError(f"`{path}` is not an analysis", "write one with `moeprune analyze`")
    require_format(found, FORMAT, path)
    metadata: _Metadata = from_json(found, _Metadata, f"`{path}`")
    tensors = checkpoint.read_tensors(header)
    layers = {name: _layer(tensors, name, path) for name in metadata.layers}
    checkpoint.check_finite(tensors, path)
    return Analysis(layers, metadata.origin, folder=Path(path).parent)


def _layer(tensors: Mapping[str, Tensor], name: str, path: str | Path) -> LayerStatistics:
    """Return the statistics of a layer of a file, whose shapes fit each other."""
    sizes = {"l": len(MASS_LEVELS)}
    for key, axes in AXES.items():
        tensor = tensors.get(f"{name}.{key}")
        found = None if tensor is None else list(tensor.shape)
        expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, found or (), strict=False)]
        if tensor is None or found != expected or len(axes) != tensor.ndim or tensor.dtype != torch.float32:
            raise MoepruneError(
                f"`{path}`: `{name}.{key}` is {'missing' if tensor is None else tensor.dtype} {found or ''},"
                f" expected torch.float32 {expected or list(axes)}",
                "write it again with `moeprune analyze`",
            )
    return LayerStatistics(**{key: tensors[f"{name}.{key}"] for key in AXES})


def class_names_of(analysis: Analysis | None) -> tuple[str, ...]:
    """Return the names of the class folders that an analysis was made from, in the order of the labels."""
    return () if analysis is None else analysis.origin.classes


def require_analysis_of(layers: Mapping[str, LayerConfig], fingerprint: str, analysis: Analysis | None) -> None:
    """Raise a MoepruneError if the analysis, if any, is not of the unpruned checkpoint with these layers."""
    if analysis is None:
        return
    if (found := analysis.origin.checkpoint) != fingerprint:
        prints = f"(fingerprint {found[:12]}…, this one has {fingerprint[:12]}…)"
        raise MoepruneError(
            f"the analysis was made for another checkpoint {prints}", "run `moeprune analyze` on this checkpoint"
        )
    for name, layer in layers.items():
        expected = [layer.num_experts, layer.terms_per_expert, layer.output_width]
        shape = list(analysis.layers[name].term_mean.shape) if name in analysis.layers else None
        if shape != expected:
            raise MoepruneError(
                f"the analysis does not fit: `{name}.term_mean` is {shape}, expected {expected}",
                "write it again with `moeprune analyze`",
            )
