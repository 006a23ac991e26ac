"""The result type of each command, its document, and its JSON Schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moeprune.calibration.results import AnalysisReport
from moeprune.demo.results import Summary
from moeprune.errors import MoepruneError
from moeprune.evaluation.results import Evaluation
from moeprune.models.results import Export, Inspection
from moeprune.pruning.results import PlanFile, Pruned, Sweep
from moeprune.records import Report, json_schema
from moeprune.report.analysis import analysis
from moeprune.report.checkpoint import export, inspection
from moeprune.report.document import Document
from moeprune.report.evaluation import evaluation
from moeprune.report.pruning import demo, pruning, sweep

COMMANDS: dict[str, tuple[type[Report], Callable[[Any], Document] | None]] = {
    "analyze": (AnalysisReport, analysis),
    "demo": (Summary, demo),
    "eval": (Evaluation, evaluation),
    "export": (Export, export),
    "inspect": (Inspection, inspection),
    "plan": (PlanFile, None),
    "prune": (Pruned, pruning),
    "sweep": (Sweep, sweep),
}
"""`sweep` is what `eval --sweep` reports, `plan` what `prune --plan` reads."""
TYPES = {command: kind for command, (kind, _) in COMMANDS.items()}


def document_of(result: Report) -> Document:
    """Return the report that text, Markdown and CI formats show."""
    return next(make(result) for kind, make in COMMANDS.values() if make and kind is type(result))


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the JSON report of a command, one of TYPES.

    Raises:
        MoepruneError: there is no such command.
    """
    if command not in TYPES:
        raise MoepruneError(f"no schema for `{command}`", f"give one of {', '.join(TYPES)}")
    schema = json_schema(TYPES[command])
    if command == "plan":  # whose fields have defaults
        layer = schema["$defs"]["LayerPlan"]
        is_list = {"properties": {"kept": {"type": "array"}}}
        layer |= {"required": [], "anyOf": [{"required": ["k"]}, {"required": ["kept"], **is_list}]}
        layer["additionalProperties"] = False
    return schema
