"""The document of each command's result."""

from __future__ import annotations

from typing import Any

from moeprune.calibration.results import AnalysisReport
from moeprune.demo.results import Summary
from moeprune.evaluation.results import Evaluation
from moeprune.models.results import Export, Inspection
from moeprune.pruning.results import Pruned, Sweep
from moeprune.records import Report
from moeprune.report.analysis import analysis
from moeprune.report.demo import demo
from moeprune.report.document import Document
from moeprune.report.evaluation import evaluation
from moeprune.report.export import export
from moeprune.report.inspection import inspection
from moeprune.report.pruning import pruning
from moeprune.report.sweep import sweep

DOCUMENTS: dict[type[Report], Any] = {
    AnalysisReport: analysis,
    Export: export,
    Evaluation: evaluation,
    Inspection: inspection,
    Pruned: pruning,
    Summary: demo,
    Sweep: sweep,
}


def document_of(result: Report) -> Document:
    """Return the report that text, Markdown and CI formats show."""
    return DOCUMENTS[type(result)](result)
