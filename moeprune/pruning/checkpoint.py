"""From a checkpoint to a pruned one, or to a sweep over many ways to prune it."""

from __future__ import annotations

import logging
from functools import cached_property
from itertools import product

from msgspec.structs import replace

from moeprune.calibration.analysis import Analysis, load_analysis, require_analysis_of
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import environment
from moeprune.files import checkpoint
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.header import read_header
from moeprune.models.description import our_header, read_description
from moeprune.models.model import Model, fingerprint, require_unpruned, save
from moeprune.models.opening import open_data_for, open_model
from moeprune.models.request import ModelSpec
from moeprune.plan import SIGNALS, Plan, experts_to_keep, scopes_of
from moeprune.pruning import compensation
from moeprune.pruning.apply import ALREADY_PRUNED, full_plan, needs_pass
from moeprune.pruning.budgets import plans_within
from moeprune.pruning.plan_file import read_plan, write_plan
from moeprune.pruning.request import PruneRequest, SweepRequest
from moeprune.pruning.results import Pruned, Search, Sweep
from moeprune.pruning.search import DropLimit, prune_best, prune_within_drop
from moeprune.pruning.streaming import prune_file
from moeprune.pruning.sweep import COMPENSATIONS_TRIED, KEEPS, Variant, grid, methods, on_frontier, sweep

logger = logging.getLogger(__name__)


class _Full:
    """An unpruned checkpoint; the model of one of moeprune is built only to pass data through it."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self.header = our_header(spec.path)
        if self.header is None or spec.foreign_only:
            self.config, plan, self.details = self.model.config, self.model.plan, self.model.details
            self.tensors = tensor_infos(self.model.state_dict())
        else:
            self.config, plan, self.details = read_description(self.header)
            self.tensors = self.header.tensors
        require_unpruned(plan, ALREADY_PRUNED)

    @cached_property
    def model(self) -> Model:
        """The model, with the preprocessing of the spec."""
        return open_model(self.spec, header=self.header)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and all tensors."""
        if self.header is None:
            return fingerprint(self.model)
        return checkpoint.fingerprint(self.header, self.config.to_json())


def prune_checkpoint(request: PruneRequest) -> Pruned:
    """Prune a checkpoint, and write the pruned one, its plan, or both.

    A static pruning that needs no pass over data goes from file to file, without building the model.

    Raises:
        MoepruneError: a file or the data cannot be read or does not fit, the checkpoint is pruned already, no
            plan meets the budget, or an output cannot be written.
    """
    request.runtime.require_device()
    full = _Full(request.checkpoint)
    analysis = None if request.analysis is None else load_analysis(request.analysis)
    if analysis is not None and (request.max_size is not None or request.max_flops is not None):
        require_analysis_of(full.config.moe_layers, full.fingerprint, analysis)
    search, cost = None, None
    if request.max_accuracy_drop is None:
        plan = _prune(request, full, analysis)
    else:
        search = _search(request, full, analysis)
    if request.output is not None:
        written = read_header(request.output)
        _, plan, _ = read_description(written)
        cost = full.config.cost(plan, written.tensors)
    if request.save_plan is not None:
        write_plan(plan, request.save_plan, request.overwrite)
    return Pruned(
        checkpoint=None if request.output is None else str(request.output),
        saved_plan=None if request.save_plan is None else str(request.save_plan),
        plan=plan,
        model=cost,
        full_model=full.config.cost({}, full.tensors),
        search=search,
    )


def _prune(request: PruneRequest, full: _Full, analysis: Analysis | None) -> Plan:
    """Write the pruned checkpoint, if one is asked for; return the plan."""
    layers = full.config.moe_layers
    if request.plan is not None:
        plans = [read_plan(request.plan, layers)]
    elif request.max_size is None and request.max_flops is None:
        plans = [full_plan(layers, request.keep, None, request.method)]
    else:
        sizes = request.max_size, request.max_flops
        plans = plans_within(full.config, full.tensors, analysis, request.method, *sizes)
    plan, with_pass = plans[0], needs_pass(plans[0], request.one_shot)
    if request.output is None:
        return plan
    is_static = all(layer.scope == "static" for layer in plan.values())
    if full.header is not None and is_static and request.data is None and not with_pass:
        preprocessing = full.details.preprocessing.updated(request.checkpoint.preprocess)
        prune_file(
            full.header, request.output, analysis, plan=plan, preprocessing=preprocessing, seed=request.seed,
            overwrite=request.overwrite,
        )  # fmt: skip
        return plan
    data = None if request.data is None else open_data_for(full.model, request.data, "calibration")
    pruned = prune_best(
        full.model, plans if with_pass else plans[:1], analysis, data=data, one_shot=request.one_shot,
        seed=request.seed, runtime=request.runtime,
    )  # fmt: skip
    save(pruned, request.output, request.overwrite)
    return plan


def _search(request: PruneRequest, full: _Full, analysis: Analysis | None) -> Search:
    """Write the smallest model within the accuracy drop; return how it was found."""
    assert request.data is not None
    assert request.output is not None
    assert request.max_accuracy_drop is not None
    model, search = prune_within_drop(
        full.model, open_data_for(full.model, request.data, "calibration"),
        DropLimit(request.max_accuracy_drop, request.confidence),
        analysis=analysis, method=request.method, seed=request.seed, runtime=request.runtime,
    )  # fmt: skip
    save(model, request.output, request.overwrite)
    return search


def sweep_checkpoint(request: SweepRequest) -> tuple[Sweep, Model, Analysis]:
    """Prune a checkpoint in many ways and evaluate each; return also the unpruned model and its analysis.

    Raises:
        MoepruneError: an input cannot be read or does not fit, or no way to prune is left.
    """
    assert request.analysis is not None
    request.runtime.require_device()
    model = open_model(request.checkpoint)
    data = open_data_for(model, request.data, "test")
    analysis = load_analysis(request.analysis)
    ways = _ways(request, model)
    results = sweep(model, ways, analysis, data, request.seed, request.runtime, request.latency_batches)
    rows = [row for row, _ in results]
    rows = [replace(row, on_frontier=best) for row, best in zip(rows, on_frontier(rows), strict=True)]
    report = Sweep(
        checkpoint=str(request.checkpoint.path),
        data=data.info,
        rows=rows,
        plot=None if request.plot is None else str(request.plot),
        environment=environment(request.runtime),
    )
    return report, model, analysis


def _ways(request: SweepRequest, model: Model) -> list[Variant]:
    """Return what to try; warn of what is left out."""
    possible = scopes_of(model.config.moe_layers.values())
    keeps = request.keeps or KEEPS
    if request.plot is not None and not (request.scope or request.signal or request.compensate):
        return list(methods(keeps, possible))
    signals = request.signal or SIGNALS
    compensations = request.compensate or COMPENSATIONS_TRIED
    for keep, (name, layer) in product(keeps, model.config.moe_layers.items()):
        experts_to_keep(keep, layer.num_experts, name, "--sweep")
    ways = list(grid(keeps, request.scope or possible, signals, compensations, possible[0]))
    if not any(way.signal != "random" and way.keep for way in ways) and signals != ("random",):
        raise MoepruneError(
            "no way to prune has such a scope, signal and compensation",
            "`gram`, `refit` and `merge` need scope static, and `merge` does not go with `gram`",
        )
    layers = model.config.moe_layers
    left_out = [way for way in ways if compensation.too_large_refits(layers, way.plan(layers))]
    if left_out:
        shares = ", ".join(dict.fromkeys(str(way.keep) for way in left_out))
        most = compensation.MAX_REGRESSORS
        logger.warning(f"`refit` is left out at {shares}: it would take more than {most:,} regressors")
    return [way for way in ways if way not in left_out]
