"""Prune a model in memory by the options of `moeprune prune`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, get_type_hints

from moeprune.amounts import experts_to_keep, parse_keep
from moeprune.calibration.analysis import Analysis, analyze, class_names_of, load_analysis, require_analysis_of
from moeprune.data.datasets import Data, Dataset
from moeprune.data.spec import DataSpec
from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.header import is_safetensors, read_header
from moeprune.models.inspection import Described
from moeprune.models.language import LanguageModel
from moeprune.models.language_config import LanguageConfig
from moeprune.models.model import Model, dataset_for, require_dense_layers
from moeprune.models.opening import opened
from moeprune.models.request import ModelSpec
from moeprune.models.runtime import Runtime
from moeprune.plan import Method, Plan, Wanted, uniform_plan
from moeprune.pruning.apply import ALREADY_PRUNED, apply_plan, calibration_data, full_plan
from moeprune.pruning.auto import affordable, choose, methods, narrower, repeat, without_dropping
from moeprune.pruning.budgets import narrower_within, plans_within_budget
from moeprune.pruning.drop_in import drop_in_plans, is_compared
from moeprune.pruning.plan_file import read_plan
from moeprune.pruning.request import PruneRequest
from moeprune.pruning.results import Candidate, FitQuality, Repeats, Search
from moeprune.pruning.search import DropLimit, prune_within_drop
from moeprune.records import from_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)
FEW_TOKENS = 80_000  # of text, on which fits may suit its domain alone


class PruneOptions(TypedDict, total=False):
    """How many experts, or hidden units, to keep and which: fields of PruneRequest, which explains them."""

    keep: str | float | Fraction | None
    mass: float | None
    width: str | float | Fraction | None
    max_size: str | float | None
    max_flops: str | float | None
    max_accuracy_drop: float | None
    plan: Plan | str | os.PathLike[str] | None
    confidence: float | None
    scope: str | None
    signal: str | None
    compensate: str | None
    energy: float | None
    rank: str | float | None
    repeat: int | None
    one_shot: bool
    seed: int


def prune(
    model: Model | str | os.PathLike[str],
    analysis: Analysis | Data | None = None,
    *,
    data: Data | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    runtime: Runtime = Runtime(),
    **options: Unpack[PruneOptions],
) -> Model:
    """Return a model whose MoE layers run few of their experts, as `moeprune prune` does.

    Layers are pruned in the order of the data flow, and what is calibrated in a layer is measured behind the
    pruned layers before it. For the first layer, that is in the analysis.

    Args:
        model: unpruned, or its file; it stays as it is. What pruning does not change lies in the same memory.
        analysis: of this model, or its file; or, in its place, data.
        data: calibration data, see moeprune.data.datasets and moeprune.data.samples; with an analysis the same data, or
            with `max_accuracy_drop` other data. None: the analysis's own is read again if layers behind the first, or a
            fit, need it.
        device, batch_size: replace those of the runtime.
        runtime: where and how models run over the data; the result is on the model's device.
        options: of PruneOptions. keep: a whole number of experts (16), or a share (0.125, `"1/8"`, a Fraction). plan:
            what to do with each layer, or its file; others stay dense.

    Raises:
        MoepruneError: options contradict each other, the model is pruned already, the analysis is another model's or
            other data's, the plan does not fit the model, no plan meets the budget, or something calibrated is asked
            for without an analysis or data.
    """
    if not (analysis is None or _is_analysis(analysis)):
        if data is not None:
            raise MoepruneError("`analysis` is neither an analysis nor its file", "give what `analyze` returns")
        analysis, data = None, analysis
    if isinstance(analysis, str | os.PathLike):
        analysis = load_analysis(Path(analysis))
    assert analysis is None or isinstance(analysis, Analysis)
    model = opened(model, runtime.offload)
    require_dense_layers(model, ALREADY_PRUNED)
    plan = options.get("plan")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    given |= {"plan": Path("plan")} if plan is not None else {}
    for name, kind in get_type_hints(PruneRequest).items():
        if kind == str | None and name in given:
            given[name] = _text(name, given[name])
    request = PruneRequest(  # checks the options; its files stand for what is in memory
        checkpoint=ModelSpec(path=Path("model")), output=Path("model"),
        data=None if data is None else DataSpec(spec="data"), runtime=runtime.updated(device, batch_size),
        **given,
    )  # fmt: skip
    if isinstance(plan, str | os.PathLike):
        plan = read_plan(Path(plan), model.config.moe_layers)
    dataset = None if data is None else dataset_for(model, data, "calibration", class_names=class_names_of(analysis))
    full = _InMemory(model)
    plans, analysis = plans_of(full, request, analysis, dataset, plan)
    return prune_model(full, request, analysis, dataset, plans).model


class Made(NamedTuple):
    """A pruned model, and how it was found: by a search, or among candidates."""

    model: Model
    search: Search | None = None
    candidates: Sequence[Candidate] = ()
    repeats: Repeats | None = None

    @property
    def fits(self) -> dict[str, FitQuality]:
        """Return how well each layer's compensation is fitted."""
        found = self.model.details.provenance.get("fits", {})
        return {name: from_json(value, FitQuality, "fits") for name, value in found.items()}


def prune_model(
    full: Described, request: PruneRequest, analysis: Analysis | None, data: Dataset | None, plans: Sequence[Plan]
) -> Made:
    """Return the pruned model of a request; plans: as `plans_of` gives them."""
    settings: dict[str, Any] = {"seed": request.seed, "runtime": request.runtime}
    if request.max_accuracy_drop is not None:
        assert data is not None
        limit = DropLimit(request.max_accuracy_drop, request.confidence)
        return Made(*prune_within_drop(full.model, data, limit, analysis=analysis, wanted=request.wanted, **settings))
    plan, candidates, repeats, calibration = plans[0], list[Candidate](), None, data
    if (len(plans) > 1 and not request.one_shot) or request.repeat is not None:
        if calibration is None:
            if analysis is None:
                raise MoepruneError("`--repeat` needs calibration data", "add `--data`, or `--analysis`")
            calibration = calibration_data(full.model, analysis)
        plan, candidates = choose(full.model, plans, calibration, **settings)
    pruned = apply_plan(full.model, plan, analysis, data=data, one_shot=request.one_shot, **settings)
    _warn_of_few_tokens(pruned)
    if request.repeat is not None:
        assert calibration is not None
        repeats = repeat(full.model, plan, calibration, request.repeat, **settings)
    return Made(pruned, None, candidates, repeats)


def _warn_of_few_tokens(pruned: Model) -> None:
    """Log a warning if a language model was fitted to little text."""
    fits = Made(pruned).fits.values()
    if isinstance(pruned.input_format, TokenFormat) and fits and (tokens := max(fit.rows for fit in fits)) < FEW_TOKENS:
        logger.warning(
            f"{tokens:,} tokens of calibration data are few: fits may suit their domain and no other; give at least"
            f" {FEW_TOKENS:,}, or check other text with `moeprune eval --by FIELD`"
        )


def plans_of(
    full: Described, request: PruneRequest, analysis: Analysis | None, data: Dataset | None, plan: Plan | None
) -> tuple[list[Plan], Analysis | None]:
    """Return what to choose from, the plan that is asked for alone, or none if one is searched; and the analysis.

    A budget that is split over the layers takes an analysis; if there is none, the data is analyzed.
    """
    layers = full.config.moe_layers
    if request.max_accuracy_drop is not None:
        return [], analysis
    if plan is not None:
        return [full_plan(layers, None, plan, Method())], analysis
    has_data = data is not None or analysis is not None
    is_budget = request.max_size is not None or request.max_flops is not None
    if has_data and is_compared(full.config, request):
        assert isinstance(full.model, LanguageModel)
        plans = drop_in_plans(full.model, request)
        return [full_plan(layers, None, plan, Method()) for plan in plans], analysis
    wanted, keep = request.wanted, parse_keep(request.keep or "1.0")
    if isinstance(full.config, LanguageConfig) and not has_data and wanted.compensate == "auto":
        wanted = wanted.replace(compensate="renorm")  # as for a folder that no model is built of
    drops = any(experts_to_keep(keep, layer.num_experts, name) < layer.num_experts for name, layer in layers.items())
    one_shot = request.one_shot or request.output is None
    if wanted.width is not None and wanted.compensate == "auto" and not drops and not is_budget:
        ways = without_dropping(wanted, layers, has_data and not one_shot)
    else:
        ways = methods(wanted, layers, has_data, one_shot, is_budget)
    if not is_budget:
        plans = affordable([uniform_plan(layers, keep, method) for method in ways], layers)
        return [full_plan(layers, None, plan, Method()) for plan in plans], analysis
    if analysis is not None:
        require_analysis_of(layers, full.fingerprint, analysis)
    elif data is not None and request.wanted.concrete_scope == "static":
        analysis = analyze(full.model, data, request.runtime)
    budget = request.max_size, request.max_flops
    if wanted != Wanted() or one_shot or len(ways) == 1:
        return plans_within_budget(full.config, full.tensors, analysis, ways, *budget), analysis
    plans = plans_within_budget(full.config, full.tensors, analysis, [*ways, *narrower(layers)], *budget)
    all_experts = narrower_within(full.config, full.tensors, *budget)
    return [*plans, *([] if all_experts is None else [all_experts])], analysis


class _InMemory(Described):
    """A model as if it were that of a file."""

    def __init__(self, model: Model):
        self.header, self.model = None, model
        self.config, self.plan, self.details = model.config, model.plan, model.details
        self.tensors = tensor_infos(model.state_dict())


def _is_analysis(value: object) -> bool:
    """Return True for an analysis or the path of its file."""
    if not isinstance(value, str | os.PathLike):
        return isinstance(value, Analysis)
    path = Path(value)
    return is_safetensors(path) and (read_header(path).metadata or {}).get("kind") == "analysis"


def _text(name: str, value: Any) -> str:
    """Return a number as an option spells it: whole numbers are counts, all others are shares."""
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}"
    if not isinstance(value, Real):
        raise MoepruneError(f"`{name}` is a {type(value).__name__}, expected a number or text")
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))
