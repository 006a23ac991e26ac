"""From a checkpoint to a pruned one, or to a sweep over many ways to prune it."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

from moeprune.amounts import keep_to_text, parse_keep
from moeprune.calibration.analysis import Analysis, class_names_of, load_analysis, require_analysis_of
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import environment
from moeprune.files import checkpoint
from moeprune.files.checkpoint import TORCH_SUFFIXES
from moeprune.files.header import Header
from moeprune.layers.surgery import prune_tensors
from moeprune.models.description import our_header, read_description
from moeprune.models.folders.form import form_of
from moeprune.models.folders.layout import read_folder
from moeprune.models.inspection import Described
from moeprune.models.language import LanguageModel
from moeprune.models.model import Model, fingerprint, require_unpruned, save
from moeprune.models.opening import open_data_for, open_model
from moeprune.models.results import ModelCost
from moeprune.plan import SCOPES, SIGNALS, Plan, Wanted
from moeprune.pruning import compensation
from moeprune.pruning.apply import ALREADY_PRUNED, decide, needs_pass, provenance, require_calibration
from moeprune.pruning.auto import possible_scope
from moeprune.pruning.folder import prune_folder, require_possible
from moeprune.pruning.language_sweep import language_sweep, language_ways
from moeprune.pruning.plan_file import read_plan, write_plan
from moeprune.pruning.prune import plans_of, prune_model
from moeprune.pruning.request import PruneRequest, SweepRequest
from moeprune.pruning.results import FitQuality, LanguageSweep, Pruned, Sweep
from moeprune.pruning.sweep import COMPENSATIONS_TRIED, KEEPS, Variant, grid, methods, on_frontier, possible_ways, sweep
from moeprune.records import to_json

logger = logging.getLogger(__name__)


def prune_checkpoint(request: PruneRequest) -> Pruned:
    """Prune a checkpoint, and write the pruned one, its plan, or both.

    A static pruning that needs no pass over data goes from file to file, without building the model, in little memory.

    Raises a MoepruneError if an input does not fit, the checkpoint is pruned already, no plan meets the budget, or an
    output cannot be written.
    """
    request.runtime.require_device()
    is_folder = request.checkpoint.is_model_folder
    if is_folder and request.data is None and request.analysis is None:
        return prune_folder(request)
    if is_folder:
        require_possible(request)
    full = Described(request.checkpoint, request.runtime.offload)
    require_unpruned(full.plan, ALREADY_PRUNED)
    analysis = None if request.analysis is None else load_analysis(request.analysis)
    names = class_names_of(analysis)
    data = None if request.data is None else open_data_for(full.model, request.data, "calibration", names)
    stated = None if request.plan is None else read_plan(request.plan, full.config.moe_layers)
    plans, analysis = plans_of(full, request, analysis, data, stated)
    if is_folder and isinstance(full.model, LanguageModel):
        full.model.require_writable(plans[0])
    plan, made, cost, fits = plans[0] if plans else {}, None, None, dict[str, FitQuality]()
    if request.output is not None:
        if full.header is not None and len(plans) == 1 and data is None and _copies(plan, full, request):
            _prune_file(request, full, full.header, analysis, plan)
        else:
            made = prune_model(full, request, analysis, data, plans)
            fits = made.fits  # before anything is written
            save(made.model, request.output, request.overwrite)
        plan, cost = (
            (made.model.plan, read_folder(request.output).cost())
            if is_folder and made
            else _read_back(full, request.output)
        )
    if request.save_plan is not None:
        write_plan(plan, request.save_plan, request.overwrite)
    return Pruned(
        checkpoint=None if request.output is None else str(request.output),
        saved_plan=None if request.save_plan is None else str(request.save_plan),
        keep=None if request.keep is None else keep_to_text(parse_keep(request.keep)),
        plan=plan,
        model=cost,
        full_model=full.model.cost() if is_folder else full.config.cost({}, full.tensors),
        search=made and made.search,
        candidates=[*made.candidates] if made else [],
        fits=fits,
        repeats=made and made.repeats,
        form=form_of(plan) if is_folder and request.output is not None else None,
    )


def _read_back(full: Described, path: Path) -> tuple[Plan, ModelCost]:
    """Return the plan and the cost of the checkpoint that was written."""
    written = our_header(path)
    assert written is not None
    _, plan, _ = read_description(written)
    return plan, full.config.cost(plan, written.tensors)


def _copies(plan: Plan, full: Described, request: PruneRequest) -> bool:
    """Return True if the pruned checkpoint is written from file to file."""
    assert request.output is not None
    is_static = all(layer.scope == "static" for layer in plan.values()) and request.repeat is None
    is_measured = needs_pass(plan, full.config.moe_layers, request.one_shot)
    return is_static and not is_measured and request.output.suffix not in TORCH_SUFFIXES


def _prune_file(request: PruneRequest, full: Described, header: Header, analysis: Analysis | None, plan: Plan) -> None:
    """Write from file to file what pruning statically in one shot, in memory, gives."""
    assert request.output is not None
    assert header.metadata is not None
    layers = full.config.moe_layers
    analysis = require_calibration(plan, layers, analysis, has_data=False, one_shot=True)
    require_analysis_of(layers, full.fingerprint, analysis)
    tensors = checkpoint.read_tensors(header)
    entries: dict[str, Tensor | checkpoint.Copied] = {name: checkpoint.Copied(header, name) for name in header.tensors}
    decided = {}
    for index, (name, layer_plan) in enumerate(plan.items()):
        moments = None if analysis is None else analysis.layers[name]
        decided[name], calibrated = decide(layer_plan, moments, None, request.seed, index, layers[name])
        take = partial(_take, header, tensors, name)
        pruned = prune_tensors(layers[name], decided[name], take, tensors[f"{name}.fc2_weight"], calibrated)
        entries |= {f"{name}.{key}": tensor for key, tensor in pruned.items()}
    made = provenance(full.fingerprint, plan, analysis, None, request.seed, request.runtime)
    changed = {
        "plan": to_json(decided),
        "provenance": full.details.provenance | made,
        "preprocessing": to_json(full.details.preprocessing),
    }
    if names := full.details.classes or class_names_of(analysis):
        changed["classes"] = names
    checkpoint.write(request.output, entries, header.metadata | changed, request.overwrite)


def _take(
    header: Header, tensors: Mapping[str, Tensor], layer: str, name: str, axis: int | None, experts: Sequence[int]
) -> Tensor | checkpoint.Copied:
    """Return a tensor of a layer of a file, or some experts' places along an axis: as bytes to copy, if they lie so."""
    if axis:
        return tensors[f"{layer}.{name}"].index_select(axis, torch.tensor(experts))
    return checkpoint.Copied(header, f"{layer}.{name}", None if axis is None else experts)


def sweep_checkpoint(request: SweepRequest) -> tuple[Sweep | LanguageSweep, Model, Analysis]:
    """Prune a checkpoint in many ways and evaluate each; return also the unpruned model and its analysis."""
    assert request.analysis is not None
    request.runtime.require_device()
    text_ways = language_ways(request) if request.checkpoint.is_model_folder else []
    model = open_model(request.checkpoint, offload=request.runtime.offload)
    analysis = load_analysis(request.analysis)
    data = open_data_for(model, request.data, "test", class_names_of(analysis))
    if isinstance(model, LanguageModel):
        require_analysis_of(model.config.moe_layers, fingerprint(model), analysis)
        found, lengths = zip(*language_sweep(model, text_ways, analysis, data, request), strict=True)
        report = LanguageSweep(
            checkpoint=str(request.checkpoint.path),
            data=data.info,
            sequence_length=lengths[0],
            rows=list(found),
            environment=environment(request.runtime),
        )
        return report, model, analysis
    ways = _ways(request, model)
    results = sweep(model, ways, analysis, data, request.seed, request.runtime, request.latency_batches, request.repeat)
    rows = [row for row, _ in results]
    rows = [replace(row, on_frontier=best) for row, best in zip(rows, on_frontier(rows), strict=True)]
    of_classes = Sweep(
        checkpoint=str(request.checkpoint.path),
        data=data.info,
        rows=rows,
        plot=None if request.plot is None else str(request.plot),
        environment=environment(request.runtime),
    )
    return of_classes, model, analysis


def _ways(request: SweepRequest, model: Model) -> list[Variant]:
    """Return what to try; warn of what is left out."""
    layers, keeps = model.config.moe_layers, request.keeps or KEEPS
    if not (request.scope or request.signal or request.compensate):
        return possible_ways(list(methods(keeps, layers)), layers)
    possible = [scope for scope in SCOPES if all(scope in layer.scopes for layer in layers.values())]
    known = [signal for signal in SIGNALS if all(signal in layer.signals for layer in layers.values())]
    signals, compensations = request.signal or known, request.compensate or COMPENSATIONS_TRIED
    scopes = [possible_scope(Wanted(scope), layers) for scope in request.scope] or possible
    able = [name for name in compensations if all(name in ("auto", *each.compensations) for each in layers.values())]
    able = [name for name in able if name != "linear" or "static" in possible]
    ways = list(grid(keeps, scopes, signals, able, possible[0]))
    wanted = [way for way in ways if way.compensate == "linear" or (way.keep and way.signal != "random")]
    if not wanted and signals != ("random",):  # there are controls alone
        raise MoepruneError(
            "no way to prune has such a scope, signal and compensation",
            "`gram`, refits, `linear` and `merge` need scope static, and `merge` does not go with `gram`",
        )
    too_large = [way for way in ways if any(compensation.too_large_refits(layers, plan) for plan in way.plans(layers))]
    if too_large:
        shares = ", ".join(dict.fromkeys(str(way.keep) for way in too_large))
        most = compensation.MAX_REGRESSORS
        logger.warning(f"refits are left out at {shares}: they would take more than {most:,} regressors")
    return [way for way in possible_ways(ways, layers) if way not in too_large]
