"""Limits that an evaluation must keep; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeprune.errors import MoepruneError


@dataclass(frozen=True)
class Gate:
    """A limit on one figure of an evaluation.

    name: as the option without dashes. section, figure: where its value stands in the evaluation's
    JSON; in the section `latency` the worst of all batch sizes counts. is_maximum: whether the value
    may be at most, or must be at least, the limit. is_fraction: whether limits lie in 0…1, or may be
    any ratio above 0.
    """

    name: str
    section: str
    figure: str
    is_maximum: bool
    is_fraction: bool = True

    @property
    def option(self) -> str:
        """The command-line option that sets its limit."""
        return "--" + self.name.replace("_", "-")


GATES = (
    Gate("max_accuracy_drop", "difference", "accuracy_drop", True),
    Gate("min_accuracy", "model", "accuracy", False),
    Gate("min_flops_reduction", "difference", "flops_reduction", False),
    Gate("min_size_reduction", "difference", "size_reduction", False),
    Gate("min_agreement", "difference", "agreement", False),
    Gate("min_speedup", "latency", "speedup", False, is_fraction=False),
)


def check_limits(limits: Mapping[str, float | None], has_baseline: bool, has_latency: bool) -> None:
    """Refuse limits that cannot be judged, before anything is computed.

    Args:
        limits: by gate name, a fraction or a ratio; None where there is none.

    Raises:
        MoepruneError: a limit that is no fraction or ratio, or one on what is not measured or compares
            with a baseline that is not given.
    """
    for gate in GATES:
        limit = limits.get(gate.name)
        if limit is None:
            continue
        if gate.is_fraction and not 0 <= limit <= 1:
            raise MoepruneError(
                f"`{gate.option} {limit}` is outside 0…1", "give a fraction: one percent is 0.01"
            )
        if not gate.is_fraction and not 0 < limit < math.inf:
            raise MoepruneError(
                f"`{gate.option} {limit}` is no ratio above 0", "give how many times as fast, such as 1.5"
            )
        if gate.section == "latency" and not has_latency:
            raise MoepruneError(f"`{gate.option}` judges measured times", "give it with `--latency`")
        if gate.section in ("difference", "latency") and not has_baseline:
            raise MoepruneError(f"`{gate.option}` compares with the full model", "give it with `--baseline`")


def judge(evaluation: Mapping[str, Any], limits: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """The gates that have a limit, with the value found and whether it passed.

    Args:
        evaluation: JSON values of an evaluation (design of eval's JSON).
        limits: by gate name; None where there is none.
    """
    results = []
    for gate in GATES:
        limit = limits.get(gate.name)
        if limit is not None:
            section = evaluation[gate.section]
            rows = section["batches"] if gate.section == "latency" else [section]
            value = min(row[gate.figure] for row in rows)
            passed = value <= limit if gate.is_maximum else value >= limit
            results.append({"name": gate.name, "limit": limit, "value": value, "passed": passed})
    return results
