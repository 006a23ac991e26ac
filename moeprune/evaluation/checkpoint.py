"""From checkpoints and labelled data to an evaluation and its gates."""

import logging

from msgspec.structs import replace

from moeprune.calibration.analysis import Analysis, load_analysis, require_analysis_of
from moeprune.errors import MoepruneError
from moeprune.evaluation.evaluate import evaluate
from moeprune.evaluation.gates import judge
from moeprune.evaluation.request import EvalRequest
from moeprune.evaluation.results import Evaluation
from moeprune.models.model import Model, fingerprint, unpruned_fingerprint
from moeprune.models.opening import open_data_for, open_model, specs_of

logger = logging.getLogger(__name__)


def evaluate_checkpoint(request: EvalRequest) -> tuple[Evaluation, Model, Analysis | None]:
    """Evaluate a checkpoint, compare it with the baseline, and judge the limits.

    Returns the evaluation, the model that it is about, and the analysis, if one is given.
    """
    request.runtime.require_device()
    compared = [] if request.baseline is None else [request.baseline.path]
    spec, *others = specs_of(request.checkpoint, request.checkpoint.path, *compared)
    model = open_model(spec)
    data = open_data_for(model, request.data, "test")
    baseline = open_model(others[0]) if others else None
    if baseline is not None and baseline.plan:
        hint = "give the checkpoint that the model was pruned from"
        raise MoepruneError(f"`--baseline {others[0].path}` is pruned, expected the full model", hint)
    if baseline is not None and model.plan and unpruned_fingerprint(model) != fingerprint(baseline):
        logger.warning(f"`{spec.path}` was not pruned from `{others[0].path}`, but from another model")
    analysis = None if request.analysis is None else load_analysis(request.analysis)
    if analysis is not None:
        require_analysis_of(model.config.moe_layers, unpruned_fingerprint(model), analysis)
    found = evaluate(model, data, baseline, request.runtime, request.latency_batches)
    gates = judge(found, request.limits, request.confidence)
    paths = {"checkpoint": str(spec.path), "baseline": str(others[0].path) if others else None}
    found = replace(found, **paths, gates=gates, passed=all(gate.passed for gate in gates))
    if baseline is not None:
        _warn_of_collapsed(found)
    return found, model, analysis


def _warn_of_collapsed(found: Evaluation) -> None:
    assert found.forgetting is not None
    assert found.difference is not None
    average = f"while the average accuracy changed by {-100 * found.difference.accuracy_drop + 0.0:+.2f} pt"
    for entry in found.forgetting.classes:
        if entry.index in found.forgetting.collapsed:
            accuracies = f"{100 * entry.baseline_accuracy:.1f} % → {100 * entry.accuracy:.1f} %"
            logger.warning(f"class {entry.index} collapsed: {accuracies} of its {entry.samples} samples, {average}")
