"""Prune a model, or route its inputs, with the statistics of calibration data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from moeprune import __version__
from moeprune.amounts import parse_keep
from moeprune.calibration.analysis import Analysis, class_names_of, require_analysis_of
from moeprune.calibration.selection import best_by_score, best_kept
from moeprune.calibration.statistics import LayerMoments, LayerStatistics, require_finite
from moeprune.calibration.walk import Stage, Walk
from moeprune.data.datasets import Data, Dataset
from moeprune.errors import MoepruneError
from moeprune.layers.experts import random_scores
from moeprune.layers.interface import LayerConfig
from moeprune.layers.surgery import Calibrated, nearest_kept, prune_layer
from moeprune.models.model import Model, dataset_for, fingerprint, private_copy, require_dense_layers
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan, Method, Plan, require_fitting_plan, uniform_plan
from moeprune.pruning import compensation
from moeprune.pruning.rerouting import best_rerouted
from moeprune.pruning.results import FitQuality
from moeprune.pruning.width import fewer_units
from moeprune.records import to_json

logger = logging.getLogger(__name__)
WIDTH_NEEDS_DATA = "dropping hidden units (`--width`) needs calibration data"
ALREADY_PRUNED = "prune the unpruned checkpoint: its surrogates and plan would not fit a second pruning"


def apply_plan(
    model: Model,
    plan: Plan,
    analysis: Analysis | None = None,
    *,
    data: Data | None = None,
    one_shot: bool = False,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Model:
    """Return a model that is pruned as a plan says, the layers in the order of the data flow.

    Args:
        model: unpruned; it stays as it is. What pruning does not change lies in the same memory.
        plan: what to do with each layer; others stay dense.
        analysis: of this model; may be None with data, or if nothing calibrated is used.
        data: calibration data; with an analysis the same data. None: the analysis's own is read again if layers
            behind the first, or a fit, need it.
        one_shot: take the statistics of all layers from the analysis, with no pass over data.
        seed: of the signal `random`.
        runtime: where and how models run over the data; the result is on the model's device.

    Raises:
        MoepruneError: the model is pruned already, the analysis is another model's or other data's, the plan does not
            fit the model, or something calibrated is asked for without an analysis or data.
    """
    require_dense_layers(model, ALREADY_PRUNED)
    plan = full_plan(model.config.moe_layers, None, plan, Method())
    used = require_calibration(plan, model.config.moe_layers, analysis, data is not None, one_shot)
    known = fingerprint(model)
    require_analysis_of(model.config.moe_layers, known, used)
    dataset = None
    if any(layer.is_calibrated for layer in plan.values()):
        if data is not None:
            dataset = dataset_for(model, data, "calibration", class_names=class_names_of(used))
        elif used is not None and needs_pass(plan, model.config.moe_layers, one_shot):
            dataset = calibration_data(model, used)
    _require_data_of_analysis(used, dataset)
    full = private_copy(model)
    if dataset is not None:
        full.to(runtime.torch_device)
    pruned = private_copy(full)
    pruning = Pruning(full, pruned, plan, used, one_shot, seed)
    if dataset is None:
        for index in range(len(plan)):
            pruning.prune(index, None)
    else:
        with Walk(full, pruned, dataset, runtime) as walk:
            for index, name in enumerate(plan):
                stage = walk.reach(name, with_stream=plan[name].is_fitted) if pruning.needs_stage(index) else None
                pruning.prune(index, stage)
                _require_data_of_analysis(used, dataset)
    _warn_of_overfitting(pruning.fits)
    made = provenance(known, plan, used, dataset, seed, runtime)
    made |= {"fits": to_json(pruning.fits), "mean_mass": pruning.mean_mass} if pruning.fits else {}
    names = model.details.classes or class_names_of(used) or (dataset.source.class_names if dataset is not None else ())
    pruned.details = model.details.replace(provenance=model.details.provenance | made, classes=names)
    return pruned.to(next(model.parameters()).device)


def _warn_of_overfitting(fits: Mapping[str, FitQuality]) -> None:
    """Log a warning if a layer's fit is much worse on samples that it was not fitted to."""
    overfitted = {name: fit for name, fit in fits.items() if fit.is_overfitted}
    if overfitted:
        name, worst = max(overfitted.items(), key=lambda each: each[1].held_out_error)
        logger.warning(
            f"{len(overfitted)} of {len(fits)} layers have too few calibration samples for their compensation: in"
            f" `{name}` {worst.regressors:,} regressors on {worst.samples:,} samples ({worst.rows:,} rows) leave"
            f" {100 * worst.fitted_error:.3g} % of the output's square on the half that is fitted,"
            f" {100 * worst.held_out_error:.3g} % on the other: more samples would help"
        )


@dataclass
class Pruning:
    """Prunes the layers of a model one after the other; analysis: None if it is not used."""

    full: Model
    pruned: Model
    plan: Plan
    analysis: Analysis | None
    one_shot: bool
    seed: int
    fits: dict[str, FitQuality] = field(default_factory=dict)
    mean_mass: dict[str, list[float]] = field(default_factory=dict)

    def moments(self, index: int) -> LayerStatistics | None:
        """Return the statistics of a planned layer behind the pruned ones before it, if the analysis has them."""
        is_known = self.analysis is not None and (index == 0 or self.one_shot)
        return self.analysis.layers[[*self.plan][index]] if is_known and self.analysis is not None else None

    def needs_stage(self, index: int) -> bool:
        """Return True if the data must reach a layer for it to be pruned."""
        name, layer = [*self.plan.items()][index]
        is_tried = not self.one_shot and takes_trials(layer, self.full.config.moe_layers[name])
        return layer.is_fitted or is_tried or (layer.is_calibrated and self.moments(index) is None)

    def prune(self, index: int, stage: Stage | None) -> None:
        """Prune a layer, with what the data brings to it if it is needed."""
        name, plan = [*self.plan.items()][index]
        moments: LayerMoments | None = self.moments(index)
        if stage is not None:
            moments = stage.moments if moments is None else moments
            require_finite(name, moments)
        plan, calibrated = decide(plan, moments, stage, self.seed, index, self.full.config.moe_layers[name])
        if plan.is_fitted and not plan.merges:
            assert stage is not None
            layer, self.fits[name] = compensation.fit(stage, plan, calibrated, self.full.config.tokens(name))
            assert moments is not None
            self.mean_mass[name] = [float(f"{mass:.4g}") for mass in moments.mean_mass.tolist()]
        else:
            layer = prune_layer(self.full.moe_layers[name], plan, calibrated)
        self.pruned.set_submodule(name, layer)


def decide(
    plan: LayerPlan, moments: LayerMoments | None, stage: Stage | None, seed: int, index: int, config: LayerConfig
) -> tuple[LayerPlan, Calibrated]:
    """Return a plan with its static set, and what is merged, chosen; and the values that pruning by it takes.

    stage: what calibration data brings to the layer, where that is measured. index: the layer's among the planned ones.
    """
    scores = random_scores(plan.num_experts, seed, index) if plan.signal == "random" else None
    if plan.scope == "static" and plan.kept is None:
        plan = plan.replace(kept=_best_experts(plan, scores, moments, stage, config))
    if plan.merges and plan.merged_into is None:
        assert stage is not None
        assert plan.kept is not None
        plan = plan.replace(merged_into=nearest_kept(stage.overlap(), plan.kept, plan.num_experts))
    if moments is None:
        return plan, Calibrated(scores)
    scores, units = moments.deviation if scores is None else scores, None
    if plan.width is not None:
        assert stage is not None
        units = fewer_units(stage, plan)
    return plan, Calibrated(scores, moments.term_mean, moments.mean_mass, units)


def _best_experts(
    plan: LayerPlan, scores: Tensor | None, moments: LayerMoments | None, stage: Stage | None, config: LayerConfig
) -> tuple[int, ...]:
    """Return the experts that a static set keeps, ascending: by scores (n), or by statistics of calibration data."""
    groups = config.equal_groups(plan)
    if scores is not None:
        return best_by_score(scores, plan.k, groups)
    assert moments is not None
    if plan.signal != "gram":
        return best_by_score(moments.scores(plan.signal), plan.k, groups)
    if stage is not None and takes_trials(plan, config):
        return best_rerouted(stage, plan.k)
    if isinstance(moments, LayerStatistics):
        return moments.best_kept(plan.k, plan.compensation, groups)
    assert stage is not None
    mass = moments.mean_mass / moments.mean_mass.sum() if plan.compensation == "renorm" else None
    return best_kept(stage.gram(plan.compensation), plan.num_experts, plan.k, mass, groups)


def takes_trials(plan: LayerPlan, config: LayerConfig) -> bool:
    """Return True if experts are to be chosen by trials on data: tokens choose others in place of dropped ones.

    Not for refits: what regressions leave of experts, by the Gram matrix, is as good a guide and costs less.
    """
    is_open = plan.signal == "gram" and plan.kept is None and plan.drops
    return is_open and plan.compensation == "renorm" and config.reroutes(plan)


def needs_pass(plan: Plan, layers: Mapping[str, LayerConfig], one_shot: bool) -> bool:
    """Return True if something must be measured that the analysis of the unpruned model lacks."""
    if any(layer.is_fitted for layer in plan.values()):
        return True
    is_behind_others = any(layer.is_calibrated for layer in [*plan.values()][1:])
    return not one_shot and (is_behind_others or any(takes_trials(layer, layers[name]) for name, layer in plan.items()))


def require_calibration(
    plan: Plan, layers: Mapping[str, LayerConfig], analysis: Analysis | None, has_data: bool, one_shot: bool
) -> Analysis | None:
    """Return the analysis, or None if the plan does not use it; raise a MoepruneError if calibration is missing or a
    refit is too large.
    """
    for name, regressors in compensation.too_large_refits(layers, plan).items():
        raise MoepruneError(
            f"`{plan[name].compensation}` of layer `{name}` would take {regressors:,} regressors:"
            f" {plan[name].k} experts of width {layers[name].expert_width} are kept; at most"
            f" {compensation.MAX_REGRESSORS:,} are possible",
            "keep fewer experts, or give `--compensate affine`",
        )
    for name, layer in plan.items():
        if layer.is_calibrated and analysis is None and not has_data:
            if layer.width is not None:
                raise MoepruneError(WIDTH_NEEDS_DATA, "give it by `--data`, or `--analysis`")
            raise MoepruneError(
                f"scope {layer.scope} with signal {layer.signal} and compensation {layer.compensation} needs"
                " calibration",
                "give an analysis (`--analysis`) or calibration data (`--data`)",
            )
        if layer.is_fitted and one_shot:
            what, hint = f"`{layer.compensation}`", "give another `--compensate`"
            if layer.width is not None:
                what, hint = "`width`", "leave `--one-shot` out"
            raise MoepruneError(f"{what} of layer `{name}` is fitted to data, not in one shot", hint)
    return analysis if any(layer.is_calibrated or layer.is_ranked for layer in plan.values()) else None


def full_plan(
    layers: Mapping[str, LayerConfig], keep: str | float | Fraction | None, plan: Plan | None, method: Method
) -> Plan:
    """Return what to do with each layer, in the order of the data flow."""
    if (keep is None) == (plan is None) and not (plan is None and method.mass):
        raise MoepruneError("give either `keep` or a plan")
    if plan is None:
        if isinstance(keep, str | float):
            keep = parse_keep(keep, "keep")
        plan = uniform_plan(layers, Fraction(1) if keep is None else keep, method)
    require_fitting_plan(plan, layers)
    return {name: plan[name] for name in layers if name in plan}


def calibration_data(model: Model, analysis: Analysis) -> Dataset:
    """Open the data that an analysis was made from, where it was or beside the analysis, or raise a MoepruneError."""
    made_from = analysis.origin.data
    if analysis.data is not None:
        return analysis.data
    spec = made_from.spec
    if analysis.folder is not None:
        places = (Path(spec), analysis.folder / spec, analysis.folder / Path(spec).name)
        spec = next((str(place) for place in places if place.exists()), spec)
    try:
        length = analysis.origin.sequence_length
        return dataset_for(model, spec, "calibration", made_from.samples, class_names_of(analysis), length)
    except MoepruneError as error:
        require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
        raise MoepruneError(
            f"cannot read the analysis's own data again: {error.message}",
            "say with `--data` where it is now, or run `moeprune analyze` again",
        ) from None


def _require_data_of_analysis(analysis: Analysis | None, data: Dataset | None) -> None:
    """Raise a MoepruneError if the data is not that of the analysis, as far as is known before a pass."""
    if analysis is None or data is None:
        return
    made_from = analysis.origin.data
    if data.samples != made_from.samples or data.fingerprint not in (None, made_from.fingerprint):
        raise MoepruneError(
            f"`{data.spec}` ({data.samples} samples) is not the data of the analysis"
            f" (`{made_from.spec}`, {made_from.samples} samples), or has changed since",
            "give the same data with the same `--limit` and `--sequence-length`, or run `moeprune analyze` again",
        )


def provenance(
    model_fingerprint: str, plan: Plan, analysis: Analysis | None, data: Dataset | None, seed: int, runtime: Runtime
) -> dict[str, Any]:
    """Return what was pruned and calibrated on, without paths that would make equal runs differ."""
    made: dict[str, Any] = {"moeprune": __version__}
    used = analysis.origin.data if analysis is not None else data.info if data is not None else None
    if used is not None:
        made["calibration"] = {**to_json(used), "spec": Path(used.spec).name}
        if any(layer.scope == "batch" for layer in plan.values()):
            made["calibration"]["batch_size"] = runtime.batch_size
    return made | {"pruned_from": {"fingerprint": model_fingerprint}, "seed": seed}
