"""JSON Schemas of what commands report, generated from the types; no torch."""

from __future__ import annotations

from typing import Any

from moeprune.calibration.results import AnalysisReport
from moeprune.demo.results import Summary
from moeprune.errors import MoepruneError
from moeprune.evaluation.results import Evaluation
from moeprune.models.results import Export, Inspection
from moeprune.pruning.results import PlanFile, Pruned, Sweep
from moeprune.records import json_schema

TYPES = {
    "analyze": AnalysisReport,
    "convert": Export,
    "demo": Summary,
    "eval": Evaluation,
    "inspect": Inspection,
    "plan": PlanFile,
    "prune": Pruned,
    "sweep": Sweep,
}
"""By command; `sweep` is what `eval --sweep` reports, `plan` what `prune --plan` reads."""


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of what a command reports.

    Args:
        command: one of TYPES.

    Raises:
        MoepruneError: there is no such command.
    """
    if command not in TYPES:
        raise MoepruneError(f"no schema for `{command}`", f"give one of {', '.join(TYPES)}")
    schema = json_schema(TYPES[command])
    if command == "plan":
        layer = schema["$defs"]["LayerPlan"]
        is_list = {"properties": {"kept": {"type": "array"}}}
        layer |= {"required": [], "anyOf": [{"required": ["k"]}, {"required": ["kept"], **is_list}]}
        layer["additionalProperties"] = False
    return schema
