"""From a model and what calibration says about it to a pruned or routed model."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from moeprune import __version__
from moeprune.calibration import Analysis, measure, require_analysis_of, require_finite
from moeprune.compensation import fit_correction
from moeprune.data import Dataset
from moeprune.errors import MoepruneError
from moeprune.model import SoftMoEViT, dataset_for, fingerprint, require_soft_moe_layers
from moeprune.plan import LayerPlan, experts_to_keep, parse_keep
from moeprune.runtime import Runtime
from moeprune.scores import random_scores, top_k
from moeprune.soft_moe import SoftMoE
from moeprune.statistics import LayerMoments, MomentsAccumulator


def prune(
    model: SoftMoEViT,
    analysis: Analysis | None = None,
    *,
    keep: str | int | Fraction,
    scope: str = "static",
    signal: str = "combine",
    compensate: str = "none",
    data: Dataset | str | None = None,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> SoftMoEViT:
    """A model in which every Soft MoE layer runs k of its experts; it shares what it can with `model`.

    Layers are pruned in the order of the data flow. With data, each is measured behind the already
    pruned ones before it; without, its statistics are those of the analysis, of the unpruned model.

    Args:
        model: unpruned; it stays as it is.
        analysis: of this model; may be None with data or where nothing calibrated is used.
        keep: the share of experts to keep (`"1/8"`, a Fraction) or their number.
        scope, signal, compensate: see moeprune.plan.LayerPlan.
        data: calibration data, or its spec; beside an analysis, the data of that. `lstsq` reads the
            analysis's own where it is None. Labels are not used.
        seed: draws the experts of the signal `random`, and the halves of the data for `lstsq`.

    Raises:
        MoepruneError: the model is pruned already, the analysis is another model's or other data's,
            or something calibrated is asked for without an analysis or data.
    """
    layers = require_soft_moe_layers(model)
    if pruned_layers := [name for name, layer in layers.items() if layer.plan is not None]:
        raise MoepruneError(
            f"layers {', '.join(f'`{name}`' for name in pruned_layers)} are already pruned",
            "prune the unpruned checkpoint: its surrogates and plan would not fit a second pruning",
        )
    if isinstance(keep, str):
        keep = parse_keep(keep)
    plans = {
        name: LayerPlan(
            scope=scope,
            k=(k := experts_to_keep(keep, layer.config.num_experts, name)),
            num_experts=layer.config.num_experts,
            signal=signal,
            compensation=compensate,
            kept=tuple(range(k)) if scope == "static" else None,  # until they are chosen
        )
        for name, layer in layers.items()
    }
    calibrated = is_calibrated(scope, signal, compensate)
    if calibrated and analysis is None and data is None:
        raise MoepruneError(
            f"scope {scope} with signal {signal} and compensation {compensate} needs calibration",
            "give an analysis (`--analysis`) or calibration data (`--data`)",
        )
    if not calibrated:
        analysis = data = None
    model_fingerprint = fingerprint(model)
    if analysis is not None:
        require_analysis_of(model, model_fingerprint, analysis)
    dataset = None
    if data is not None:
        dataset = dataset_for(model, data, "calibration")
    elif compensate == "lstsq" and analysis is not None:
        dataset = calibration_data(model, analysis)

    pruned = _sharing_copy(model)
    for index, (name, plan) in enumerate(plans.items()):
        statistics: LayerMoments | None = None
        if analysis is not None and (index == 0 or dataset is None):
            statistics = analysis.layers[name]
        elif dataset is not None:
            measured = measure(pruned, [name], dataset, runtime, f"measure {name}", MomentsAccumulator)
            statistics = measured[name].result()
            require_finite({name: statistics}, dataset)
        scores = _expert_scores(plan, statistics, seed, index)
        layer = prune_layer(layers[name], plan, scores, None if statistics is None else statistics.slot_mean)
        pruned.set_submodule(name, layer)
        if compensate == "lstsq" and plan.has_surrogate and dataset is not None:
            correction = fit_correction(pruned, model, name, dataset, seed, runtime)
            layer.surrogate = layer.surrogate + correction.to(layer.surrogate)
        _require_data_of_analysis(analysis, dataset)
    provenance = {
        **model.details.provenance,
        "pruned_from": {"fingerprint": model_fingerprint},
        "seed": seed,
        "moeprune": __version__,
    }
    if analysis is not None:
        provenance["calibration"] = analysis.provenance["data"]
    elif dataset is not None:
        provenance["calibration"] = dataset.to_json()
    pruned.details = replace(model.details, provenance=provenance)
    return pruned


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
        for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
            tensors[name] = tensors[name][kept.to(device)]
    elif scores is not None:
        tensors["score_weights"] = scores.to(layer.phi)
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


def calibration_data(model: SoftMoEViT, analysis: Analysis) -> Dataset:
    """The data that an analysis was made from, opened again.

    Raises:
        MoepruneError: it is not there any more.
    """
    made_from = analysis.provenance["data"]
    return dataset_for(model, made_from["spec"], "calibration", made_from["samples"])


def _require_data_of_analysis(analysis: Analysis | None, data: Dataset | None) -> None:
    if analysis is None or data is None or data.fingerprint is None:
        return
    made_from = analysis.provenance["data"]
    if data.fingerprint != made_from["fingerprint"]:
        raise MoepruneError(
            f"`{data.spec}` ({data.samples} samples) is not the data of the analysis"
            f" (`{made_from['spec']}`, {made_from['samples']} samples), or has changed since",
            "give the same data with the same `--limit`, or run `moeprune analyze` again",
        )


def _sharing_copy(model: SoftMoEViT) -> SoftMoEViT:
    """A copy of the modules with the same tensors: swapping a layer in one leaves the other alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()
