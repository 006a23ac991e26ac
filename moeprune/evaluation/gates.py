"""Limits that an evaluation must keep; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from moeprune.errors import MoepruneError
from moeprune.evaluation.evidence import Drop, Evidence, Median, Share, samples_needed
from moeprune.evaluation.results import Evaluation, GateResult


def _exact(evaluation: Evaluation) -> list[Evidence]:
    return []


def _accuracy(evaluation: Evaluation) -> list[Evidence]:
    samples = evaluation.data.samples
    return [Share(round(evaluation.model.accuracy * samples), samples)]


def _agreement(evaluation: Evaluation) -> list[Evidence]:
    assert evaluation.difference is not None
    samples = evaluation.data.samples
    return [Share(round(evaluation.difference.agreement * samples), samples)]


def _accuracy_drop(evaluation: Evaluation) -> list[Evidence]:
    assert evaluation.difference is not None
    return [Drop(*msgspec.structs.astuple(evaluation.difference.outcomes))]


def _speedup(evaluation: Evaluation) -> list[Evidence]:
    assert evaluation.latency is not None
    return [Median(batch.speedups or ()) for batch in evaluation.latency.batches]


@dataclass(frozen=True)
class Gate:
    """A limit on one figure of an evaluation.

    name: as the option without dashes. section, figure: where its value stands in the evaluation;
    in the section `latency` the worst of all batch sizes counts. is_maximum: whether the value
    may be at most, or must be at least, the limit. evidence: what the evaluation observed of the figure,
    for each batch size where there are several; nothing of an exact one. is_fraction: whether limits lie
    in 0…1, or may be any ratio above 0.
    """

    name: str
    section: str
    figure: str
    is_maximum: bool
    evidence: Callable[[Evaluation], Sequence[Evidence]] = _exact
    is_fraction: bool = True

    @property
    def option(self) -> str:
        """The command-line option that sets its limit."""
        return "--" + self.name.replace("_", "-")

    def keeps(self, value: float, limit: float) -> bool:
        """Whether a value keeps a limit."""
        return value <= limit if self.is_maximum else value >= limit

    def worst(self, values: Sequence[float]) -> float:
        """Of several values the one that is against the model."""
        return max(values) if self.is_maximum else min(values)


GATES = (
    Gate("max_accuracy_drop", "difference", "accuracy_drop", True, _accuracy_drop),
    Gate("min_accuracy", "model", "accuracy", False, _accuracy),
    Gate("min_flops_reduction", "difference", "flops_reduction", False),
    Gate("min_size_reduction", "difference", "size_reduction", False),
    Gate("min_agreement", "difference", "agreement", False, _agreement),
    Gate("min_speedup", "latency", "speedup", False, _speedup, is_fraction=False),
)


def check_limits(
    limits: Mapping[str, float | None],
    has_baseline: bool,
    has_latency: bool,
    confidence: float | None = None,
) -> None:
    """Refuse limits that cannot be judged, before anything is computed.

    Args:
        limits: by gate name, a fraction or a ratio; None where there is none.
        confidence: with which the limits must be kept; None: measured values count.

    Raises:
        MoepruneError: a limit that is no fraction or ratio, or one on what is not measured or compares
            with a baseline that is not given; a confidence below one half, of one, or of no limit.
    """
    if confidence is not None:
        if not 0.5 <= confidence < 1:
            raise MoepruneError(
                f"`--confidence {confidence}` is not within 0.5 and 1",
                "give with which probability a passed limit is truly kept, such as 0.95",
            )
        if all(limit is None for limit in limits.values()):
            raise MoepruneError(
                "`--confidence` goes with a gate", "add one, such as `--max-accuracy-drop 0.01`"
            )
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


def judge(
    evaluation: Evaluation, limits: Mapping[str, float | None], confidence: float | None = None
) -> list[GateResult]:
    """Judge the gates that have a limit.

    Args:
        evaluation: what the limits are on.
        limits: by gate name; None where there is none.
        confidence: with which each limit must be kept; None: measured values count.
    """
    results = []
    for gate in GATES:
        limit = limits.get(gate.name)
        if limit is not None:
            section = getattr(evaluation, gate.section)
            parts = section.batches if gate.section == "latency" else [section]
            value = gate.worst([getattr(part, gate.figure) for part in parts])
            evidence = gate.evidence(evaluation) if confidence is not None else ()
            results.append(_verdict(gate, value, limit, evidence, confidence))
    return results


def _verdict(
    gate: Gate, value: float, limit: float, evidence: Sequence[Evidence], confidence: float | None
) -> GateResult:
    reason: Literal["missed", "undecided"] | None = None
    bound, samples, needed = None, None, None
    if evidence and confidence is not None:
        bounds = [part.bound(confidence) for part in evidence]
        bound = gate.worst(bounds)
        samples = evidence[bounds.index(bound)].samples
    if not gate.keeps(value, limit):
        reason = "missed"
    elif bound is not None and confidence is not None and not gate.keeps(bound, limit):
        reason = "undecided"
        numbers = [
            samples_needed(part, limit, confidence)
            for part, its_bound in zip(evidence, bounds, strict=True)
            if not gate.keeps(its_bound, limit)
        ]
        needed = None if None in numbers else max(number for number in numbers if number is not None)
    return GateResult(
        name=gate.name,
        limit=limit,
        value=value,
        passed=reason is None,
        reason=reason,
        confidence=None if bound is None else confidence,
        bound=bound,
        samples=samples,
        samples_needed=needed,
    )
