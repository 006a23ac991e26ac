"""From a model and what calibration says about it to a pruned or routed model."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune import __version__
from moeprune.calibration import Analysis, measure, require_analysis_of, require_finite
from moeprune.compensation import fit_correction
from moeprune.data import Dataset
from moeprune.errors import MoepruneError
from moeprune.model import (
    Model,
    dataset_for,
    fingerprint,
    private_copy,
    require_dense_layers,
    soft_moe_layers,
)
from moeprune.plan import LayerPlan, experts_to_keep, parse_keep
from moeprune.runtime import Runtime
from moeprune.scores import random_scores, top_k
from moeprune.soft_moe import SoftMoE
from moeprune.statistics import LayerMoments, MomentsAccumulator


def prune(
    model: Model,
    analysis: Analysis | None = None,
    *,
    keep: str | float | Fraction,
    scope: str = "static",
    signal: str = "combine",
    compensate: str = "none",
    data: Dataset | str | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Model:
    """A model in which every Soft MoE layer runs k of its experts.

    Layers are pruned in the order of the data flow, and all that is calibrated in a layer is measured
    behind the already pruned ones before it. For the first layer that is what the analysis says.

    Args:
        model: unpruned; it stays as it is. What pruning does not change lies in the same memory.
        analysis: of this model; may be None with data, or where nothing calibrated is used.
        keep: the share of experts to keep (`"1/8"`, 0.125, a Fraction) or their number (`"16"`, 16).
        scope: see moeprune.plan.LayerPlan, as for signal and compensate.
        signal: ranks the experts.
        compensate: what stands in for dropped experts.
        data: calibration data, or its spec; beside an analysis the same data. Where it is None, the
            analysis's own is opened again if layers behind the first, or `lstsq`, need it. Labels are
            not used.
        seed: draws the experts of the signal `random`, and the halves of the data for `lstsq`.
        runtime: where and how models run over the data; the result lies where the model does.

    Raises:
        MoepruneError: the model is pruned already, the analysis is another model's or other data's,
            or something calibrated is asked for without an analysis or data.
    """
    plans = _plans(model, keep, scope, signal, compensate)
    calibrated = is_calibrated(scope, signal, compensate)
    if calibrated and analysis is None and data is None:
        raise MoepruneError(
            f"scope {scope} with signal {signal} and compensation {compensate} needs calibration",
            "give an analysis (`--analysis`) or calibration data (`--data`)",
        )
    model_fingerprint = fingerprint(model)
    if not calibrated:
        analysis = dataset = None
    else:
        if analysis is not None:
            require_analysis_of(model, model_fingerprint, analysis)
        dataset = _calibration_data(model, analysis, data, needed=compensate == "lstsq" or len(plans) > 1)

    full = private_copy(model)
    if dataset is not None:
        full.to(runtime.torch_device)
    pruned = private_copy(full)
    dense_layers = soft_moe_layers(full)
    for index, (name, plan) in enumerate(plans.items()):
        moments: LayerMoments | None = None
        if analysis is not None and index == 0:
            moments = analysis.layers[name]
        elif dataset is not None:
            measured = measure(pruned, [name], dataset, runtime, f"measure {name}", MomentsAccumulator)
            moments = measured[name].result()
            require_finite({name: moments}, dataset)
        scores = _expert_scores(plan, moments, seed, index)
        layer = prune_layer(dense_layers[name], plan, scores, None if moments is None else moments.slot_mean)
        pruned.set_submodule(name, layer)
        if compensate == "lstsq" and plan.has_surrogate and dataset is not None:
            correction = fit_correction(pruned, full, name, dataset, seed, runtime)
            layer.surrogate += correction.to(layer.surrogate)
        _require_data_of_analysis(analysis, dataset)
    provenance = _provenance(analysis, dataset, scope, runtime)
    provenance |= {"pruned_from": {"fingerprint": model_fingerprint}, "seed": seed}
    pruned.details = replace(model.details, provenance={**model.details.provenance, **provenance})
    return pruned.to(next(model.parameters()).device)


def _plans(
    model: Model, keep: str | float | Fraction, scope: str, signal: str, compensate: str
) -> dict[str, LayerPlan]:
    """A plan for each layer, with the first k experts where they are yet to be chosen."""
    layers = require_dense_layers(
        model, "prune the unpruned checkpoint: its surrogates and plan would not fit a second pruning"
    )
    if isinstance(keep, str):
        keep = parse_keep(keep)
    elif isinstance(keep, float):
        keep = parse_keep(str(Fraction(keep)), "keep")
    plans = {}
    for name, layer in layers.items():
        n = layer.config.num_experts
        k = experts_to_keep(keep, n, name)
        kept = tuple(range(k)) if scope == "static" else None
        plans[name] = LayerPlan(scope, k, n, signal, compensate, kept)
    return plans


def is_calibrated(scope: str, signal: str, compensate: str) -> bool:
    """Whether something is used that only calibration data can tell."""
    scores_are = signal == "deviation" or (scope == "static" and signal == "combine")
    return scores_are or compensate in ("mean", "lstsq")


def prune_layer(
    layer: SoftMoE, plan: LayerPlan, scores: Tensor | None, slot_mean: Tensor | None = None
) -> SoftMoE:
    """A layer that follows the plan, made of a dense one.

    Args:
        layer: dense.
        plan: its `kept` is replaced by the experts that are chosen here.
        scores: with scope `static` those of the experts, the best k of which are kept; else what the
            signal multiplies each expert's mass with (`deviation`) or takes for it (`random`);
            None where the signal is the mass alone. (n)
        slot_mean: mu (n,p,d), for compensation `mean` or `lstsq`.
    """
    tensors = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    device = layer.phi.device
    if plan.scope == "static":
        assert scores is not None
        kept = top_k(scores, plan.k)
        plan = replace(plan, kept=tuple(kept.tolist()))
        columns = (
            kept
            if plan.compensation == "renorm"
            else torch.cat([kept, torch.tensor(plan.dropped, dtype=torch.int64)])
        )
        tensors["phi"] = tensors["phi"][:, columns.to(device)]
        for name in tensors:
            if name.startswith("fc"):
                tensors[name] = tensors[name][kept.to(device)]
    elif scores is not None:
        tensors["score_weights"] = scores.to(device, torch.float32)
    if plan.has_surrogate:
        assert slot_mean is not None
        if plan.kept is not None:
            slot_mean = slot_mean[columns]
            slot_mean[: plan.k] = 0  # a kept slot has its own output
        tensors["surrogate"] = slot_mean.to(layer.phi, copy=True)
    with torch.device("meta"):
        pruned = SoftMoE(layer.config, plan)
    pruned.load_state_dict(tensors, assign=True)
    return pruned.requires_grad_(False).eval()


def _expert_scores(
    plan: LayerPlan, statistics: LayerMoments | None, seed: int, layer_index: int
) -> Tensor | None:
    if plan.signal == "random":
        return random_scores(plan.num_experts, seed, layer_index)
    if plan.scope != "static":
        return statistics.deviation if plan.signal == "deviation" and statistics is not None else None
    assert statistics is not None
    if plan.signal == "deviation":
        return statistics.mean_mass * statistics.deviation
    return statistics.mean_mass


def calibration_data(model: Model, analysis: Analysis) -> Dataset:
    """The data that an analysis was made from, opened again.

    Raises:
        MoepruneError: it is not there any more.
    """
    made_from = analysis.provenance["data"]
    try:
        return dataset_for(model, made_from["spec"], "calibration", made_from["samples"])
    except MoepruneError as error:
        raise MoepruneError(
            f"cannot read the analysis's own data again: {error.message}",
            "say with `--data` where it is now, or run `moeprune analyze` again",
        ) from None


def _calibration_data(
    model: Model, analysis: Analysis | None, data: Dataset | str | None, needed: bool
) -> Dataset | None:
    """The data to measure layers on, opened; None where the analysis has all that is needed."""
    if data is None:
        return calibration_data(model, analysis) if needed and analysis is not None else None
    dataset = dataset_for(model, data, "calibration")
    _require_data_of_analysis(analysis, dataset)
    return dataset if needed or analysis is None else None


def _require_data_of_analysis(analysis: Analysis | None, data: Dataset | None) -> None:
    """Raise a MoepruneError if the data is not that of the analysis, as far as is known before a pass."""
    if analysis is None or data is None:
        return
    made_from = analysis.provenance["data"]
    if data.samples != made_from["samples"] or data.fingerprint not in (None, made_from["fingerprint"]):
        raise MoepruneError(
            f"`{data.spec}` ({data.samples} samples) is not the data of the analysis"
            f" (`{made_from['spec']}`, {made_from['samples']} samples), or has changed since",
            "give the same data with the same `--limit`, or run `moeprune analyze` again",
        )


def _provenance(
    analysis: Analysis | None, data: Dataset | None, scope: str, runtime: Runtime
) -> dict[str, Any]:
    """What the result was calibrated on, without paths that would make equal runs differ."""
    provenance: dict[str, Any] = {"moeprune": __version__}
    used = None
    if analysis is not None:
        used = analysis.provenance["data"]
    elif data is not None:
        used = data.to_json()
    if used is not None:
        provenance["calibration"] = {**used, "spec": Path(used["spec"]).name}
        if scope == "batch":
            provenance["calibration"]["batch_size"] = runtime.batch_size
    return provenance
