"""From a folder of transformers to one with fewer experts, tensor by tensor: no model is built."""

from typing import Any

from moeprune import __version__
from moeprune.amounts import keep_to_text, parse_keep
from moeprune.calibration.selection import best_by_score
from moeprune.errors import MoepruneError
from moeprune.layers.experts import random_scores
from moeprune.models.folders.layout import COMPENSATIONS, ModelFolder, read_folder
from moeprune.models.folders.writing import require_fitting, write_folder
from moeprune.plan import Method, Plan, uniform_plan
from moeprune.pruning.apply import WIDTH_NEEDS_DATA
from moeprune.pruning.drop_in import DROP_IN
from moeprune.pruning.plan_file import read_plan, write_plan
from moeprune.pruning.request import PruneRequest
from moeprune.pruning.results import Pruned


def prune_folder(request: PruneRequest) -> Pruned:
    """Prune a folder of transformers, and write the pruned one, its plan, or both.

    Raises a MoepruneError if the folder's layout is unknown, the plan does not fit it, the choice of experts needs
    calibration data, or an output cannot be written.
    """
    _require_supported(request)
    if option := _given(request, "max_size", "max_flops", "repeat"):
        raise MoepruneError(f"`{option}` needs calibration data", "add `--data`, or `--analysis`")
    if request.width is not None:
        raise MoepruneError(WIDTH_NEEDS_DATA, "add `--data`, or `--analysis`")
    folder = read_folder(request.checkpoint.path)
    plan = decided(folder, plan_of(folder, request), request.seed)
    cost = None
    if request.output is not None:
        write_folder(folder, plan, request.output, request.overwrite, {"moeprune": __version__, "seed": request.seed})
        cost = read_folder(request.output).cost()
    if request.save_plan is not None:
        write_plan(plan, request.save_plan, request.overwrite)
    return Pruned(
        checkpoint=None if request.output is None else str(request.output),
        saved_plan=None if request.save_plan is None else str(request.save_plan),
        keep=None if request.keep is None else keep_to_text(parse_keep(request.keep)),
        plan=plan,
        model=cost,
        full_model=folder.cost(),
        search=None,
        candidates=[],
        fits={},
        repeats=None,
    )


def _require_supported(request: PruneRequest) -> None:
    """Raise a MoepruneError for options that a folder does not take."""
    if request.mass is not None:
        raise MoepruneError("`--mass` does not go with a folder of transformers", "give `--keep` or `--max-size`")
    if request.max_accuracy_drop is not None:
        hint = "give `--keep` or `--max-size`, then judge the result by `moeprune eval --max-loss-increase`"
        raise MoepruneError("`--max-accuracy-drop` searches on labels, which text does not have", hint)
    if request.energy is not None and request.compensate in (None, "auto"):
        hint = "leave it out: it decides the rank of a compensation"
        raise MoepruneError("`--energy` goes with nothing that `auto` tries in a folder of transformers", hint)
    if (budget := _given(request, "max_size", "max_flops")) and request.compensate not in (None, *DROP_IN):
        message = f"`{budget}` does not go with `--compensate {request.compensate}` in a folder of transformers"
        raise MoepruneError(message, "leave one of them out, or give `--keep` in place of the budget")


def _given(request: PruneRequest, *names: str) -> str | None:
    """Return the first of some options that is given, as it is spelt."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(request, name) is not None), None)


def drop_in(request: PruneRequest) -> PruneRequest:
    """Return the request of a pruning by data with a compensation that leaves a model of the same architecture.

    Raises a MoepruneError for one that does not, and for options that a folder does not take.
    """
    _require_supported(request)
    if request.plan is not None or request.compensate in (None, "auto"):
        return request
    if request.compensate == "none" and request.keep is None:
        return request  # without dropping experts, which changes no router
    if request.compensate not in COMPENSATIONS:
        message = f"`--compensate {request.compensate}` needs more than fewer experts, which is all a folder can hold"
        raise MoepruneError(message, "give `--compensate renorm-refit`, the default, or `renorm`")
    return request


def plan_of(folder: ModelFolder, request: PruneRequest) -> Plan:
    """Return the plan of a request, with the same number of experts in each layer.

    Raises a MoepruneError if it does not fit the folder.
    """
    layers = folder.layers
    if request.plan is not None:
        plan = read_plan(request.plan, layers)  # type: ignore[arg-type]
    else:
        assert request.keep is not None
        wanted, keep = request.wanted, parse_keep(request.keep)
        compensate = "renorm" if wanted.compensate == "auto" else wanted.compensate
        signal: Any = wanted.signal_for(compensate)
        method = Method(wanted.concrete_scope, signal, compensate, None, wanted.energy, wanted.rank)
        plan = uniform_plan(layers, keep, method)
    require_fitting(folder, plan)
    return {name: plan[name] for name in layers}


def decided(folder: ModelFolder, plan: Plan, seed: int) -> Plan:
    """Return a plan with all experts chosen, as many in each group; raise a MoepruneError if that takes data."""
    chosen = {}
    for index, (name, layer) in enumerate(plan.items()):
        if layer.kept is None and layer.k == layer.num_experts:
            layer = layer.replace(kept=tuple(range(layer.k)))
        if layer.width is not None:
            raise MoepruneError(WIDTH_NEEDS_DATA, "add `--data`")
        if layer.kept is None and layer.signal != "random":
            hint = "add `--data`, or choose blindly: `--signal random`"
            raise MoepruneError(f"signal `{layer.signal}` needs calibration data", hint)
        if layer.compensation == "renorm-refit" and layer.drops:
            raise MoepruneError("`renorm-refit` needs calibration data", "add `--data`, or give `--compensate renorm`")
        if layer.kept is None:
            scores, groups = random_scores(layer.num_experts, seed, index), folder.layers[name].groups
            layer = layer.replace(kept=best_by_score(scores, layer.k, groups))
        chosen[name] = layer
    return chosen
