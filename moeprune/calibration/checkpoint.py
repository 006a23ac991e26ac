"""From a checkpoint and calibration data to a file of an analysis."""

from __future__ import annotations

import logging

from moeprune.calibration.analysis import Analysis, analyze, save_analysis
from moeprune.calibration.request import AnalyzeRequest
from moeprune.calibration.results import AnalysisReport
from moeprune.calibration.statistics import summarize
from moeprune.models.model import Model
from moeprune.models.opening import open_data_for, open_model
from moeprune.plan import scopes_of

logger = logging.getLogger(__name__)


def analyze_checkpoint(request: AnalyzeRequest) -> tuple[AnalysisReport, Model, Analysis]:
    """Analyze a model and write the analysis; return the report, and the model and analysis that it is about.

    Raises:
        MoepruneError: an input cannot be read or does not fit, or the output cannot be written.
    """
    request.runtime.require_device()
    model = open_model(request.checkpoint)
    data = open_data_for(model, request.data, "calibration")
    analysis = analyze(model, data, request.runtime)
    layers = {
        name: summarize(statistics, scopes_of([model.config.moe_layers[name]]))
        for name, statistics in analysis.layers.items()
    }
    for name, layer in layers.items():
        if layer.experts == 1:
            logger.warning(
                f"layer `{name}` has one expert: nothing to prune. A Soft MoE of one expert cannot represent"
                " some simple convex functions, however large the expert is (Chung et al. 2024, Theorem 1):"
                " train with many small experts"
            )
    save_analysis(analysis, request.output, request.overwrite)
    report = AnalysisReport(
        checkpoint=str(request.checkpoint.path), analysis=str(request.output), data=data.info, layers=layers
    )
    return report, model, analysis
