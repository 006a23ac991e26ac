"""From a model and what calibration says about it to a pruned or routed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune import __version__
from moeprune.calibration.analysis import Analysis, require_analysis_of
from moeprune.calibration.passes import measure, require_finite
from moeprune.calibration.selection import best_kept
from moeprune.calibration.statistics import (
    LayerMoments,
    LayerStatistics,
    MomentsAccumulator,
    StatisticsAccumulator,
)
from moeprune.calibration.sums import lost_gram
from moeprune.data.datasets import Dataset
from moeprune.data.preprocessing import Preprocessing
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.checkpoint import Copied
from moeprune.files.header import Header, read_header
from moeprune.layers.interface import LayerConfig
from moeprune.layers.merging import nearest_kept
from moeprune.layers.scores import random_scores, top_k
from moeprune.layers.surgery import Calibrated, prune_layer, prune_tensors
from moeprune.models.description import read_description
from moeprune.models.model import (
    Model,
    dataset_for,
    fingerprint,
    private_copy,
    require_dense_layers,
)
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan, Plan, parse_keep, plan_to_json, require_fitting_plan, uniform_plan
from moeprune.pruning.compensation import (
    Gathered,
    Stream,
    add_correction,
    fit_routed,
    fit_static,
    gather,
    refit_kept,
    require_affordable_refit,
)
from moeprune.pruning.narrowing import narrowed
from moeprune.records import to_json

ALREADY_PRUNED = "prune the unpruned checkpoint: its surrogates and plan would not fit a second pruning"


def prune(
    model: Model,
    analysis: Analysis | None = None,
    *,
    keep: str | float | Fraction | None = None,
    plan: Plan | None = None,
    scope: str = "static",
    signal: str = "combine",
    compensate: str = "none",
    energy: float | None = None,
    data: Dataset | str | None = None,
    one_shot: bool = False,
    seed: int = 0,
    runtime: Runtime = Runtime(),
) -> Model:
    """A model in which Soft MoE layers run k of their experts.

    Layers are pruned in the order of the data flow, and all that is calibrated in a layer is measured
    behind the already pruned ones before it. For the first layer that is what the analysis says.

    Args:
        model: unpruned; it stays as it is. What pruning does not change lies in the same memory.
        analysis: of this model; may be None with data, or where nothing calibrated is used.
        keep: the share of experts to keep in each layer (`"1/8"`, 0.125, a Fraction) or their number
            (`"16"`, 16).
        plan: instead of keep, scope, signal, compensate and energy: what to do with each layer. Layers that
            it does not name stay dense.
        scope: see moeprune.plan.LayerPlan, as for signal and compensate.
        signal: ranks the experts.
        compensate: what stands in for dropped experts.
        energy: give what a fitted compensation adds in the fewest directions of the output that hold this
            share of it, where that is cheaper; None: in all of them.
        data: calibration data, or its spec; beside an analysis the same data. Where it is None, the
            analysis's own is opened again if layers behind the first, or a fit, need it. Labels are
            not used.
        one_shot: take all layers' statistics from the analysis, without measuring any layer behind the
            pruned ones before it.
        seed: draws the experts of the signal `random`.
        runtime: where and how models run over the data; the result lies where the model does.

    Raises:
        MoepruneError: the model is pruned already, the analysis is another model's or other data's,
            the plan does not fit the model, or something calibrated is asked for without an analysis
            or data.
    """
    dense = require_dense_layers(model, ALREADY_PRUNED)
    configs = {name: layer.config for name, layer in dense.items()}
    plan = _full_plan(configs, keep, plan, scope, signal, compensate, energy)
    calibrated = any(layer.is_calibrated for layer in plan.values())
    if calibrated and analysis is None and data is None:
        raise _not_calibrated(plan)
    if one_shot:
        _require_one_shot(plan)
    for name, layer_plan in plan.items():
        require_affordable_refit(configs[name], layer_plan, name)
    model_fingerprint = fingerprint(model)
    if not any(layer.is_calibrated or layer.is_ranked for layer in plan.values()):
        analysis = None
    require_analysis_of(configs, model_fingerprint, analysis)
    dataset = None
    if calibrated:
        dataset = _calibration_data(model, analysis, data, needed=needs_pass(plan, one_shot))

    full = private_copy(model)
    if dataset is not None:
        full.to(runtime.torch_device)
    pruned = private_copy(full)
    pruner = _Pruner(pruned, full, analysis, dataset, seed, runtime)
    for index, (name, layer_plan) in enumerate(plan.items()):
        pruner.prune(name, layer_plan, index, from_analysis=index == 0 or one_shot)
        _require_data_of_analysis(analysis, dataset)
    provenance = _provenance(analysis, dataset, plan, runtime)
    provenance |= {"pruned_from": {"fingerprint": model_fingerprint}, "seed": seed}
    pruned.details = replace(model.details, provenance={**model.details.provenance, **provenance})
    return pruned.to(next(model.parameters()).device)


@dataclass(frozen=True)
class _Pruner:
    """Prunes the layers of a model one after the other.

    pruned: the model that changes. full: the unpruned one. analysis, data: at least one where something is
    calibrated.
    """

    pruned: Model
    full: Model
    analysis: Analysis | None
    data: Dataset | None
    seed: int
    runtime: Runtime

    def prune(self, name: str, plan: LayerPlan, index: int, from_analysis: bool) -> None:
        """Prune a layer that is dense yet, by a plan that may leave its experts open.

        Args:
            name: of the layer.
            plan: for it.
            index: its place among the planned layers.
            from_analysis: take its statistics from the analysis, if there is one.
        """
        stream = None
        if self.data is not None:
            stream = Stream(self.pruned, self.full, name, self.data, self.runtime)
        gathered = None
        if plan.scope == "static" and plan.is_fitted and stream is not None:
            gathered = gather(stream, plan.compensation)
        moments = gathered.moments if gathered else self._moments(name, plan, from_analysis)
        if moments is not None and self.data is not None:
            require_finite({name: moments}, self.data)
        wanted = _chosen(plan, moments, gathered, self.seed, index)
        plan = wanted.replace(rank=None, energy=None)
        calibrated = Calibrated(
            _score_weights(plan, moments, self.seed, index),
            None if moments is None else moments.term_mean,
            None if moments is None else moments.mean_mass,
        )
        layer = prune_layer(self.full.moe_layers[name], plan, calibrated)
        self.pruned.set_submodule(name, layer)
        power = None if stream is None else _fit(stream, plan, gathered)
        if power is not None and wanted != plan:
            tokens = self.full.config.tokens(name)
            self.pruned.set_submodule(name, narrowed(layer, wanted, power, tokens))

    def _moments(self, name: str, plan: LayerPlan, from_analysis: bool) -> LayerMoments | None:
        """Return the statistics that a plan needs, from the analysis or by a pass over the data."""
        if not plan.is_calibrated:
            return None
        if from_analysis and self.analysis is not None:
            return self.analysis.layers[name]
        if self.data is None:
            return None
        chooses = plan.signal == "gram" and plan.kept is None
        accumulator = StatisticsAccumulator if chooses else MomentsAccumulator
        measured = measure(self.pruned, [name], self.data, self.runtime, f"measure {name}", accumulator)
        return measured[name].result()


def _fit(stream: Stream, plan: LayerPlan, gathered: Gathered | None) -> Tensor | None:
    """Fit the compensation of the stream's pruned layer, if its plan has a fitted one.

    Returns:
        ZᵀZ (q,q) of the regressors; None if nothing was fitted.
    """
    if not plan.is_fitted or plan.merges:
        return None
    if gathered is None:
        correction, power = fit_routed(stream, plan.compensation)
    else:
        correction, power = fit_static(gathered, plan)
    add_correction(stream.layer, correction)
    if plan.compensation == "refit" and plan.k:
        refit_kept(stream)
    return power


def prune_file(
    source: str | Path | Header,
    target: str | Path,
    analysis: Analysis | None = None,
    *,
    keep: str | float | Fraction | None = None,
    plan: Plan | None = None,
    signal: str = "combine",
    compensate: str = "none",
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    overwrite: bool = True,
) -> None:
    """Prune a checkpoint statically in one shot, from file to file: the memory it takes is small.

    Writes what `moeprune.save(prune(load(source), ..., one_shot=True), target)` writes. No model is
    built, so that the factory of a model of the user's own code is not needed.

    Args:
        source: an unpruned checkpoint, or its header.
        target: the file to write.
        analysis: of this checkpoint; may be None where nothing calibrated is used.
        keep: as in `prune`, like plan, signal and seed.
        plan: of scope static alone.
        signal: ranks the experts.
        compensate: `none`, `renorm` or `mean`.
        preprocessing: takes the place of the checkpoint's.
        seed: draws the experts of the signal `random`.
        overwrite: replace a target that exists.

    Raises:
        MoepruneError: the checkpoint is damaged or pruned already, the analysis is another one's, the
            target cannot be written, or values are NaN or infinite.
    """
    header = read_header(source)
    config, existing, details = read_description(header)
    require_unpruned(existing)
    plan = _full_plan(config.moe_layers, keep, plan, "static", signal, compensate, None)
    source_fingerprint = checkpoint.fingerprint(header, config.to_json())
    if any(layer.is_calibrated for layer in plan.values()):
        _require_one_shot(plan)
        if analysis is None:
            raise _not_calibrated(plan)
    elif not any(layer.is_ranked for layer in plan.values()):
        analysis = None
    require_analysis_of(config.moe_layers, source_fingerprint, analysis)
    tensors = checkpoint.read_tensors(header)
    entries: dict[str, Tensor | Copied] = {name: Copied(header, name) for name in header.tensors}
    for index, (name, layer_plan) in enumerate(plan.items()):
        moments = None if analysis is None else analysis.layers[name]
        plan[name] = _chosen(layer_plan, moments, None, seed, index)
        entries |= _pruned_entries(header, tensors, name, config.moe_layers[name], plan[name], moments)
    provenance = _provenance(analysis, None, plan, Runtime())
    provenance |= {"pruned_from": {"fingerprint": source_fingerprint}, "seed": seed}
    assert header.metadata is not None
    metadata = header.metadata | {
        "plan": plan_to_json(plan),
        "provenance": {**details.provenance, **provenance},
    }
    if preprocessing is not None:
        metadata["preprocessing"] = to_json(preprocessing)
    checkpoint.write(target, entries, metadata, overwrite)


def _pruned_entries(
    header: Header,
    tensors: Mapping[str, Tensor],
    layer: str,
    config: LayerConfig,
    plan: LayerPlan,
    moments: LayerMoments | None,
) -> dict[str, Tensor | Copied]:
    """Return the tensors of a statically pruned layer of a file: rows of its own, or values in memory."""

    def take(name: str, axis: int | None, experts: Sequence[int]) -> Tensor | Copied:
        if axis is None:
            return Copied(header, f"{layer}.{name}")
        if axis == 0:
            return Copied(header, f"{layer}.{name}", experts)
        return tensors[f"{layer}.{name}"].index_select(axis, torch.tensor(experts))

    calibrated = Calibrated(term_mean=None if moments is None else moments.term_mean)
    pruned = prune_tensors(config, plan, take, calibrated)
    dtype = tensors[f"{layer}.fc2_weight"].dtype
    return {
        f"{layer}.{name}": tensor.to(dtype) if isinstance(tensor, Tensor) else tensor
        for name, tensor in pruned.items()
    }


def require_unpruned(plan: Plan) -> None:
    """Raise a MoepruneError if a checkpoint has a plan already."""
    if plan:
        names = ", ".join(f"`{name}`" for name in plan)
        raise MoepruneError(f"layers {names} are already pruned", ALREADY_PRUNED)


def needs_pass(plan: Plan, one_shot: bool) -> bool:
    """Whether something has to be measured that the analysis of the unpruned model does not say."""
    behind_others = list(plan.values())[1:]
    measured = not one_shot and any(layer.is_calibrated for layer in behind_others)
    return measured or any(layer.is_fitted for layer in plan.values())


def _chosen(
    plan: LayerPlan, moments: LayerMoments | None, gathered: Gathered | None, seed: int, layer_index: int
) -> LayerPlan:
    """The plan with its static set and what is merged, where that is yet to be chosen."""
    if plan.scope == "static" and plan.kept is None:
        plan = plan.replace(kept=_best_experts(plan, moments, gathered, seed, layer_index))
    if plan.merges and plan.merged_into is None:
        assert gathered is not None
        assert plan.kept is not None
        power = gathered.halves[0].power + gathered.halves[1].power
        plan = plan.replace(merged_into=nearest_kept(power, plan.kept, plan.num_experts))
    return plan


def _best_experts(
    plan: LayerPlan, moments: LayerMoments | None, gathered: Gathered | None, seed: int, layer_index: int
) -> tuple[int, ...]:
    """The experts that a static set keeps, ascending."""
    n = plan.num_experts
    if plan.signal == "random":
        return tuple(top_k(random_scores(n, seed, layer_index), plan.k).tolist())
    assert moments is not None
    if plan.signal == "gram":
        if gathered is not None:
            gram = lost_gram(*gathered.halves, moments.term_mean, plan.compensation)
            return best_kept(gram, n, plan.k)
        assert isinstance(moments, LayerStatistics)
        return moments.best_kept(plan.k, plan.compensation)
    scores = moments.mean_mass
    if plan.signal == "deviation":
        scores = scores * moments.deviation
    return tuple(top_k(scores, plan.k).tolist())


def _score_weights(
    plan: LayerPlan, moments: LayerMoments | None, seed: int, layer_index: int
) -> Tensor | None:
    """What the signal of a routed plan multiplies each expert's mass with, or takes for it (n)."""
    if plan.scope == "static" or plan.signal == "combine":
        return None
    if plan.signal == "random":
        return random_scores(plan.num_experts, seed, layer_index)
    assert moments is not None
    return moments.deviation


def _require_one_shot(plan: Plan) -> None:
    for name, layer in plan.items():
        if layer.is_fitted:
            raise MoepruneError(
                f"`{layer.compensation}` of layer `{name}` is found on data, not in one shot",
                "give another `--compensate`",
            )


def _not_calibrated(plan: Plan) -> MoepruneError:
    layer = next(layer for layer in plan.values() if layer.is_calibrated)
    return MoepruneError(
        f"scope {layer.scope} with signal {layer.signal} and compensation {layer.compensation} needs"
        " calibration",
        "give an analysis (`--analysis`) or calibration data (`--data`)",
    )


def _full_plan(
    layers: Mapping[str, LayerConfig],
    keep: str | float | Fraction | None,
    plan: Plan | None,
    scope: str,
    signal: str,
    compensate: str,
    energy: float | None,
) -> Plan:
    """What to do with each layer, in the order of the data flow."""
    if (keep is None) == (plan is None):
        raise MoepruneError("give either `keep` or a plan")
    if plan is None:
        if isinstance(keep, str):
            keep = parse_keep(keep)
        elif isinstance(keep, float):
            keep = parse_keep(str(Fraction(keep)), "keep")
        assert keep is not None
        experts = {name: layer.num_experts for name, layer in layers.items()}
        plan = uniform_plan(experts, keep, scope, signal, compensate, energy=energy)
    require_fitting_plan(plan, layers)
    return {name: plan[name] for name in layers if name in plan}


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
    analysis: Analysis | None, data: Dataset | None, plan: Plan, runtime: Runtime
) -> dict[str, Any]:
    """What the result was calibrated on, without paths that would make equal runs differ."""
    provenance: dict[str, Any] = {"moeprune": __version__}
    used = None
    if analysis is not None:
        used = analysis.provenance["data"]
    elif data is not None:
        used = to_json(data.info)
    if used is not None:
        provenance["calibration"] = {**used, "spec": Path(used["spec"]).name}
        if any(layer.scope == "batch" for layer in plan.values()):
            provenance["calibration"]["batch_size"] = runtime.batch_size
    return provenance
