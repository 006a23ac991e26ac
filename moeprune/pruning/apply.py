"""From a model and what calibration says of it to a pruned or routed model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from moeprune import __version__
from moeprune.calibration.analysis import Analysis, require_analysis_of
from moeprune.calibration.passes import measure, require_finite
from moeprune.calibration.statistics import (
    LayerMoments,
    MomentsAccumulator,
    StatisticsAccumulator,
)
from moeprune.data.datasets import Dataset
from moeprune.data.info import DataInfo
from moeprune.errors import MoepruneError
from moeprune.layers.interface import LayerConfig
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.model import (
    Model,
    dataset_for,
    fingerprint,
    private_copy,
    require_dense_layers,
)
from moeprune.models.runtime import Runtime
from moeprune.plan import (
    LayerPlan,
    Method,
    Plan,
    parse_keep,
    require_fitting_plan,
    uniform_plan,
)
from moeprune.pruning.choice import choose_experts, score_weights
from moeprune.pruning.compensation import (
    Gathered,
    Stream,
    add_correction,
    fit_routed,
    fit_static,
    gather,
    refit_kept,
    require_affordable_refits,
)
from moeprune.pruning.narrowing import narrowed
from moeprune.records import to_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

ALREADY_PRUNED = "prune the unpruned checkpoint: its surrogates and plan would not fit a second pruning"


class MethodWords(TypedDict, total=False):
    """The fields of moeprune.plan.Method as keyword arguments."""

    scope: str
    signal: str
    compensate: str
    mass: float | None
    energy: float | None


def prune(
    model: Model,
    analysis: Analysis | None = None,
    *,
    keep: str | float | Fraction | None = None,
    plan: Plan | None = None,
    data: Dataset | str | None = None,
    one_shot: bool = False,
    seed: int = 0,
    runtime: Runtime = Runtime(),
    **method: Unpack[MethodWords],
) -> Model:
    """Return a model whose MoE layers run few of their experts.

    Layers are pruned in the order of the data flow, and what is calibrated in a layer is measured behind the
    pruned layers before it. For the first layer that is what the analysis says.

    Args:
        model: unpruned; it stays as it is. What pruning does not change lies in the same memory.
        analysis: of this model; may be None with data, or where nothing calibrated is used.
        keep: the share of experts to keep in each layer (`"1/8"`, 0.125, a Fraction) or their number (16).
        plan: in place of keep and method: what to do with each layer; others stay dense.
        data: calibration data, or its spec; with an analysis the same data. None: the analysis's own is
            opened again if layers behind the first, or a fit, need it.
        one_shot: take the statistics of all layers from the analysis, with no pass over data.
        seed: of the signal `random`.
        runtime: where and how models run over the data; the result lies where the model does.
        method: `scope`, `signal`, `compensate`, `mass` and `energy` (see moeprune.plan.Method).

    Raises:
        MoepruneError: the model is pruned already, the analysis is another model's or other data's,
            the plan does not fit the model, or something calibrated is asked for without an analysis
            or data.
    """
    dense = require_dense_layers(model, ALREADY_PRUNED)
    configs = {name: layer.config for name, layer in dense.items()}
    plan = full_plan(configs, keep, plan, Method(**method))
    require_affordable_refits(configs, plan)
    require_calibration(plan, analysis is not None or data is not None, one_shot)
    model_fingerprint = fingerprint(model)
    is_calibrated = any(layer.is_calibrated for layer in plan.values())
    if not (is_calibrated or any(layer.is_ranked for layer in plan.values())):
        analysis = None
    require_analysis_of(configs, model_fingerprint, analysis)
    dataset = None
    if is_calibrated:
        dataset = _calibration_data(model, analysis, data, needed=needs_pass(plan, one_shot))

    full = private_copy(model)
    if dataset is not None:
        full.to(runtime.torch_device)
    pruned = private_copy(full)
    pruner = _Pruner(pruned, full, analysis, dataset, seed, runtime)
    for index, (name, layer_plan) in enumerate(plan.items()):
        pruner.prune(name, layer_plan, index, from_analysis=index == 0 or one_shot)
        _require_data_of_analysis(analysis, dataset)
    provenance = provenance_of(analysis, dataset, plan, runtime)
    provenance |= {"pruned_from": {"fingerprint": model_fingerprint}, "seed": seed}
    pruned.details = model.details.replace(provenance={**model.details.provenance, **provenance})
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
        wanted = choose_experts(plan, moments, gathered, self.seed, index)
        plan = wanted.replace(rank=None, energy=None)
        calibrated = Calibrated(
            score_weights(plan, moments, self.seed, index),
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


def require_calibration(plan: Plan, has_calibration: bool, one_shot: bool) -> None:
    """Raise a MoepruneError if a plan needs calibration data and there is none, or needs a pass over data."""
    for name, layer in plan.items():
        if layer.is_calibrated and not has_calibration:
            raise MoepruneError(
                f"scope {layer.scope} with signal {layer.signal} and compensation {layer.compensation} needs"
                " calibration",
                "give an analysis (`--analysis`) or calibration data (`--data`)",
            )
        if layer.is_fitted and one_shot:
            raise MoepruneError(
                f"`{layer.compensation}` of layer `{name}` is fitted to data, not in one shot",
                "give another `--compensate`",
            )


def full_plan(
    layers: Mapping[str, LayerConfig], keep: str | float | Fraction | None, plan: Plan | None, method: Method
) -> Plan:
    """Return what to do with each layer, in the order of the data flow."""
    if (keep is None) == (plan is None) and not (plan is None and method.mass):
        raise MoepruneError("give either `keep` or a plan")
    if plan is None:
        if isinstance(keep, str):
            keep = parse_keep(keep, "keep")
        elif isinstance(keep, float):
            keep = parse_keep(str(Fraction(keep)), "keep")
        elif keep is None:
            keep = Fraction(1)  # as many as hold the mass
        experts = {name: layer.num_experts for name, layer in layers.items()}
        plan = uniform_plan(experts, keep, method)
    require_fitting_plan(plan, layers)
    return {name: plan[name] for name in layers if name in plan}


def calibration_data(model: Model, analysis: Analysis) -> Dataset:
    """The data that an analysis was made from, opened again.

    Raises:
        MoepruneError: it is not there any more.
    """
    made_from = analysis.origin.data
    try:
        return dataset_for(model, made_from.spec, "calibration", made_from.samples)
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
    made_from = analysis.origin.data
    if data.samples != made_from.samples or data.fingerprint not in (None, made_from.fingerprint):
        raise MoepruneError(
            f"`{data.spec}` ({data.samples} samples) is not the data of the analysis"
            f" (`{made_from.spec}`, {made_from.samples} samples), or has changed since",
            "give the same data with the same `--limit`, or run `moeprune analyze` again",
        )


def provenance_of(
    analysis: Analysis | None, data: Dataset | None, plan: Plan, runtime: Runtime
) -> dict[str, Any]:
    """What the result was calibrated on, without paths that would make equal runs differ."""
    provenance: dict[str, Any] = {"moeprune": __version__}
    used: DataInfo | None = None
    if analysis is not None:
        used = analysis.origin.data
    elif data is not None:
        used = data.info
    if used is not None:
        provenance["calibration"] = {**to_json(used), "spec": Path(used.spec).name}
        if any(layer.scope == "batch" for layer in plan.values()):
            provenance["calibration"]["batch_size"] = runtime.batch_size
    return provenance
