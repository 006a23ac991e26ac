"""Limits that an evaluation must keep, judged by measured values or by their bounds; no torch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeprune.errors import MoepruneError
from moeprune.evaluation.intervals import drop_at_most, median_at_least, share_at_least
from moeprune.evaluation.results import Evaluation, GateResult, Outcomes

MOST_SAMPLES = 100_000_000
"""Largest answer of `samples_needed`: limits that these cannot decide practically equal the value."""


@dataclass(frozen=True)
class Evidence:
    """Samples behind a figure of an evaluation.

    samples: their number.
    bound: maps a confidence in 0.5…1 to the unfavourable one-sided bound of the figure: with at least this
        probability the true figure is no worse.
    keeps: maps a limit, a confidence and a number of samples with the same rates to True if their bound
        would be within the limit.
    """

    samples: int
    bound: Callable[[float], float]
    keeps: Callable[[float, float, int], bool]


def of_share(successes: int, samples: int) -> Evidence:
    """Return the evidence of independent samples for a share that has a lower limit."""

    def bound(confidence: float, count: int = samples) -> float:
        return share_at_least(successes * count / samples, count, confidence)

    return Evidence(samples, bound, lambda limit, confidence, count: bound(confidence, count) >= limit)


def of_drop(outcomes: Outcomes) -> Evidence:
    """Return the evidence of paired predictions for a drop that has an upper limit."""
    samples = outcomes.samples

    def bound(confidence: float, count: int = samples) -> float:
        times = count / samples
        lost, won = times * outcomes.lost, times * outcomes.won
        return drop_at_most(times * outcomes.both, lost, won, times * outcomes.neither, confidence)

    return Evidence(samples, bound, lambda limit, confidence, count: bound(confidence, count) <= limit)


def of_median(values: Sequence[float]) -> Evidence:
    """Return the evidence of independent positive values for their median, which has a lower limit."""

    def keeps(limit: float, confidence: float, count: int) -> bool:
        above = sum(value >= limit for value in values)  # more than half of all values must be
        return share_at_least(above * count / len(values), count, confidence) >= 0.5

    return Evidence(len(values), lambda confidence: median_at_least(values, confidence), keeps)


def samples_needed(evidence: Evidence, limit: float, confidence: float) -> int | None:
    """Return how many samples with the same rates would have a bound that keeps the limit.

    That of the evidence does not. None if MOST_SAMPLES are too few.

    >>> samples_needed(of_share(100, 100), 0.98, 0.95)
    149
    """
    few, many = evidence.samples, 2 * evidence.samples
    while not evidence.keeps(limit, confidence, many):
        few, many = many, 2 * many
        if many > MOST_SAMPLES:
            return None
    return bisect_left(range(many), True, few + 1, many, key=lambda n: evidence.keeps(limit, confidence, n))


@dataclass(frozen=True)
class Gate:
    """A limit on one figure of an evaluation.

    name: of the option, without dashes.
    section, figure: where the value is in the evaluation; in `latency` the worst of all batch sizes counts.
    is_maximum: the value may be at most, and not at least, the limit.
    """

    name: str
    section: str
    figure: str
    is_maximum: bool

    @property
    def option(self) -> str:
        """The command-line option that sets its limit."""
        return "--" + self.name.replace("_", "-")

    def keeps(self, value: float, limit: float) -> bool:
        """Return True if a value keeps a limit."""
        return value <= limit if self.is_maximum else value >= limit

    def worst(self, values: Sequence[float]) -> float:
        """Return the least favourable value."""
        return max(values) if self.is_maximum else min(values)


GATES = (
    Gate("max_accuracy_drop", "difference", "accuracy_drop", True),
    Gate("min_accuracy", "model", "accuracy", False),
    Gate("min_flops_reduction", "difference", "flops_reduction", False),
    Gate("min_size_reduction", "difference", "size_reduction", False),
    Gate("min_agreement", "difference", "agreement", False),
    Gate("min_speedup", "latency", "speedup", False),
)


def check_limits(limits: Mapping[str, float], has_baseline: bool, has_latency: bool, confidence: float | None) -> None:
    """Raise a MoepruneError for limits (fractions or ratios by gate name) that cannot be judged.

    They are out of range, or need a baseline or latency that is missing; or the confidence is out of range or
    comes without a limit.
    """
    check_confidence(confidence)
    if confidence is not None and not limits:
        raise MoepruneError("`--confidence` goes with a gate", "add one, such as `--max-accuracy-drop 0.01`")
    for gate in GATES:
        limit = limits.get(gate.name)
        if limit is None:
            continue
        given = f"`{gate.option} {limit}`"
        if gate.section == "latency" and not 0 < limit < math.inf:
            raise MoepruneError(f"{given} is not a ratio above 0", "give a speed-up such as 1.5")
        if gate.section != "latency" and not 0 <= limit <= 1:
            raise MoepruneError(f"{given} is outside 0…1", "give a fraction: one percent is 0.01")
        if gate.section == "latency" and not has_latency:
            raise MoepruneError(f"`{gate.option}` judges measured times", "give it with `--latency`")
        if gate.section in ("difference", "latency") and not has_baseline:
            raise MoepruneError(f"`{gate.option}` compares with the full model", "give it with `--baseline`")


def check_confidence(confidence: float | None) -> None:
    """Raise a MoepruneError unless a confidence is None or in [0.5, 1)."""
    if confidence is not None and not 0.5 <= confidence < 1:
        raise MoepruneError(
            f"`--confidence {confidence}` is not within 0.5 and 1",
            "give the probability that a limit that passes is truly kept, such as 0.95",
        )


def judge(evaluation: Evaluation, limits: Mapping[str, float], confidence: float | None = None) -> list[GateResult]:
    """Judge the gates that have a limit: by measured values, or by their bounds at a confidence."""
    results = []
    for gate in GATES:
        limit = limits.get(gate.name)
        if limit is not None:
            section = getattr(evaluation, gate.section)
            parts = section.batches if gate.section == "latency" else [section]
            value = gate.worst([getattr(part, gate.figure) for part in parts])
            evidence = _evidence(gate, parts, evaluation.data.samples) if confidence is not None else []
            results.append(_verdict(gate, value, limit, evidence, confidence or 0))
    return results


def _evidence(gate: Gate, parts: Sequence[Any], samples: int) -> list[Evidence]:
    """Return the evidence for a gate's figure in each part of its section; none of figures that are exact."""
    if gate.figure == "accuracy_drop":
        return [of_drop(part.outcomes) for part in parts]
    if gate.figure == "speedup":
        return [of_median(part.speedups) for part in parts]
    if gate.figure in ("accuracy", "agreement"):
        return [of_share(round(getattr(part, gate.figure) * samples), samples) for part in parts]
    return []


def _verdict(gate: Gate, value: float, limit: float, evidence: Sequence[Evidence], confidence: float) -> GateResult:
    bounds = [part.bound(confidence) for part in evidence]
    bound = gate.worst(bounds) if bounds else None
    reason: Literal["missed", "undecided"] | None = None
    numbers: list[int | None] = [None]
    if not gate.keeps(value, limit):
        reason = "missed"
    elif bound is not None and not gate.keeps(bound, limit):
        reason = "undecided"
        undecided = (part for part, own in zip(evidence, bounds, strict=True) if not gate.keeps(own, limit))
        numbers = [samples_needed(part, limit, confidence) for part in undecided]
    return GateResult(
        name=gate.name,
        limit=limit,
        value=value,
        passed=reason is None,
        reason=reason,
        confidence=None if bound is None else confidence,
        bound=bound,
        samples=None if bound is None else evidence[bounds.index(bound)].samples,
        samples_needed=max((number for number in numbers if number), default=None) if all(numbers) else None,
    )
