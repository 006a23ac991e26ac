"""From checkpoints and labelled data to an evaluation and its gates."""

from msgspec.structs import replace

from moeprune.calibration.analysis import Analysis, class_names_of, load_analysis, require_analysis_of
from moeprune.data.tokens import TokenFormat
from moeprune.evaluation.evaluate import evaluate
from moeprune.evaluation.gates import check_kind
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.evaluation.request import EvalRequest
from moeprune.evaluation.results import Evaluation
from moeprune.models.model import Model, unpruned_fingerprint
from moeprune.models.opening import open_data_for, open_model, specs_of


def evaluate_checkpoint(request: EvalRequest) -> tuple[Evaluation | LanguageEvaluation, Model, Analysis | None]:
    """Evaluate a checkpoint, compare it with the baseline, and judge the limits.

    Returns the evaluation, the model that it is about, and the analysis, if one is given.
    """
    request.runtime.require_device()
    compared = [] if request.baseline is None else [request.baseline.path]
    spec, *others = specs_of(request.checkpoint, request.checkpoint.path, *compared)
    offload = request.runtime.offload
    model = open_model(spec, offload=offload)
    check_kind(request.limits, isinstance(model.input_format, TokenFormat))
    analysis = None if request.analysis is None else load_analysis(request.analysis)
    data = open_data_for(model, request.data, "test", class_names_of(analysis), request.by)
    baseline = open_model(others[0], offload=offload) if others else None
    if analysis is not None:
        require_analysis_of(model.config.moe_layers, unpruned_fingerprint(model), analysis)
    found = evaluate(
        model, data, baseline, request.runtime, request.latency_batches, gates=request.limits,
        confidence=request.confidence,
    )  # fmt: skip
    paths = {"checkpoint": str(spec.path), "baseline": str(others[0].path) if others else None}
    return replace(found, **paths), model, analysis
