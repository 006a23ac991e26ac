"""From a folder of transformers to one with fewer experts, tensor by tensor: no model is built."""

from typing import Any

from moeprune import __version__
from moeprune.amounts import keep_to_text, parse_keep
from moeprune.calibration.selection import best_by_score
from moeprune.errors import MoepruneError
from moeprune.layers.experts import random_scores
from moeprune.models.folders.form import DROP_IN, WITH_CODE, form_of
from moeprune.models.folders.layout import ModelFolder, read_folder
from moeprune.models.folders.writing import require_fitting, write_folder
from moeprune.models.model import require_unpruned
from moeprune.plan import Method, Plan, uniform_plan
from moeprune.pruning.apply import ALREADY_PRUNED, WIDTH_NEEDS_DATA
from moeprune.pruning.drop_in import COMPARED
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
    require_unpruned(folder.plan, ALREADY_PRUNED)
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
        form=None if request.output is None else form_of(plan),
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
    if (budget := _given(request, "max_size", "max_flops")) and request.compensate not in (None, *COMPARED):
        message = f"`{budget}` does not go with `--compensate {request.compensate}` in a folder of transformers"
        raise MoepruneError(message, "leave one of them out, or give `--keep` in place of the budget")


def _given(request: PruneRequest, *names: str) -> str | None:
    """Return the first of some options that is given, as it is spelt."""
    return next((f"--{name.replace('_', '-')}" for name in names if getattr(request, name) is not None), None)


def require_possible(request: PruneRequest) -> None:
    """Raise a MoepruneError for a compensation that no folder can hold, and for options that it does not take."""
    _require_supported(request)
    if request.compensate not in (None, "auto", *DROP_IN, *WITH_CODE):
        others = ", ".join(f"`{name}`" for name in WITH_CODE)
        hint = f"give `--compensate renorm-refit`, the default, `renorm`, or one that takes custom code: {others}"
        raise MoepruneError(f"`--compensate {request.compensate}` is not what a folder can hold", hint)


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
        _require_blind(compensate)
        signal: Any = wanted.signal_for(compensate)
        method = Method(wanted.concrete_scope, signal, compensate, None, wanted.energy, wanted.rank)
        plan = uniform_plan(layers, keep, method)
    require_fitting(folder, plan)
    return {name: plan[name] for name in layers}


def _require_blind(compensation: str) -> None:
    """Raise a MoepruneError for a compensation that takes calibration data."""
    if compensation not in ("none", "renorm"):
        hint = "add `--data`, or give `--compensate renorm`"
        raise MoepruneError(f"`{compensation}` needs calibration data", hint)


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
        if layer.drops:
            _require_blind(layer.compensation)
        if layer.kept is None:
            scores, groups = random_scores(layer.num_experts, seed, index), folder.layers[name].groups
            groups = groups if layer.cuts_router else 1
            layer = layer.replace(kept=best_by_score(scores, layer.k, groups))
        chosen[name] = layer
    return chosen
