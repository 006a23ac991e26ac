"""Limits that an evaluation must keep, judged by measured values or by their bounds; no torch."""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeprune.errors import MoepruneError
from moeprune.evaluation.intervals import drop_at_most, mean_at_most, median_at_least, share_at_least
from moeprune.evaluation.language_results import LanguageEvaluation
from moeprune.evaluation.results import Evaluation, GateResult, Outcomes

GATES = {
    "max_accuracy_drop": "difference",
    "min_accuracy": "model",
    "max_loss_increase": "difference",
    "max_perplexity_ratio": "difference",
    "max_kl": "difference",
    "min_flops_reduction": "difference",
    "min_size_reduction": "difference",
    "min_agreement": "difference",
    "min_speedup": "latency",
}
"""The section of an evaluation that has the figure of a gate; in `latency` the worst of all batch sizes counts."""
OF_CLASSES = ("max_accuracy_drop", "min_accuracy")
OF_LANGUAGE = ("max_loss_increase", "max_perplexity_ratio", "max_kl")
"""Gates that go with one kind of model only: with classes, or a language model."""
MOST_SAMPLES = 100_000_000
"""Largest answer of `samples_needed`: limits that these cannot decide practically equal the value."""


@dataclass(frozen=True)
class Evidence:
    """Samples behind a figure of an evaluation.

    bound: maps a confidence in 0.5…1 to the unfavourable one-sided bound of the figure: with at least this probability
    the true figure is no worse. keeps: maps a limit, a confidence and a number of samples with the same rates to True
    if their bound would be within the limit.
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
        both, lost, won, neither = (count / samples * cell for cell in outcomes.cells)
        return drop_at_most(both, lost, won, neither, confidence)

    return Evidence(samples, bound, lambda limit, confidence, count: bound(confidence, count) <= limit)


def of_median(values: Sequence[float]) -> Evidence:
    """Return the evidence of independent positive values for their median, which has a lower limit."""

    def keeps(limit: float, confidence: float, count: int) -> bool:
        above = sum(value >= limit for value in values)  # more than half of all values must be
        return share_at_least(above * count / len(values), count, confidence) >= 0.5

    return Evidence(len(values), lambda confidence: median_at_least(values, confidence), keeps)


def of_mean(
    samples: int, mean: float, deviation: float, figure_of: Callable[[float], float] = float, is_lower: bool = False
) -> Evidence:
    """Return the evidence of at least two independent samples for a figure that depends on their mean.

    deviation: standard deviation of the samples. figure_of: maps the upper bound of the mean to that of the figure; or,
    with is_lower, to the lower bound of a figure that has a lower limit.
    """

    def bound(confidence: float, count: int = samples) -> float:
        return figure_of(mean_at_most(count, mean, deviation, confidence))

    def keeps(limit: float, confidence: float, count: int) -> bool:
        found = bound(confidence, count)
        return found >= limit if is_lower else found <= limit

    return Evidence(samples, bound, keeps)


def samples_needed(evidence: Evidence, limit: float, confidence: float) -> int | None:
    """Return how many samples with the same rates, more than there are, keep the limit; None: over MOST_SAMPLES.

    >>> samples_needed(of_share(100, 100), 0.98, 0.95)
    149
    """
    few, many = evidence.samples, 2 * evidence.samples
    while not evidence.keeps(limit, confidence, many):
        few, many = many, 2 * many
        if many > MOST_SAMPLES:
            return None
    return bisect_left(range(many), True, few + 1, many, key=lambda n: evidence.keeps(limit, confidence, n))


def check_confidence(confidence: float | None) -> None:
    """Raise a MoepruneError unless a confidence is None or in [0.5, 1)."""
    if confidence is not None and not 0.5 <= confidence < 1:
        hint = "give the probability that a limit that passes is truly kept, such as 0.95"
        raise MoepruneError(f"`--confidence {confidence}` is not within 0.5 and 1", hint)


def check_kind(limits: Iterable[str], is_language: bool) -> None:
    """Raise a MoepruneError for a gate that does not go with the kind of a model."""
    wrong, right = (OF_CLASSES, OF_LANGUAGE) if is_language else (OF_LANGUAGE, OF_CLASSES)
    if found := next((name for name in limits if name in wrong), None):
        kind = "language models have no classes" if is_language else "the model is no language model"
        options = " or ".join(f"`--{name.replace('_', '-')}`" for name in right)
        raise MoepruneError(f"`--{found.replace('_', '-')}` does not go with the model: {kind}", f"give {options}")


def judge(
    evaluation: Evaluation | LanguageEvaluation,
    limits: Mapping[str, float],
    confidence: float | None = None,
    evidence_for: Callable[[str], Evidence | None] | None = None,
) -> list[GateResult]:
    """Judge the gates that have a limit: by measured values, or by their bounds at a confidence.

    evidence_for: gives the evidence for a figure but the speed-up; None: that of predicted classes.
    """

    def evidence(figure: str, part: Any) -> Evidence | None:
        if figure == "speedup":
            return of_median(part.speedups)
        return _of_classes(figure, part, evaluation.data.samples) if evidence_for is None else evidence_for(figure)

    return [_judge(evaluation, name, limits[name], confidence, evidence) for name in GATES if name in limits]


def _judge(
    evaluation: Evaluation | LanguageEvaluation,
    name: str,
    limit: float,
    confidence: float | None,
    evidence_for: Callable[[str, Any], Evidence | None],
) -> GateResult:
    extreme, _, figure = name.partition("_")
    worst, keeps = (max, operator.le) if extreme == "max" else (min, operator.ge)
    section = getattr(evaluation, GATES[name])
    parts = section.batches if figure == "speedup" else [section]
    value = worst([getattr(part, figure) for part in parts])
    evidence, bounds, needed = [], [], []
    reason: Literal["missed", "undecided"] | None = None if keeps(value, limit) else "missed"
    if confidence is not None:
        evidence = [part for part in (evidence_for(figure, part) for part in parts) if part]
        bounds = [part.bound(confidence) for part in evidence]
        undecided = [part for part, bound in zip(evidence, bounds, strict=True) if not keeps(bound, limit)]
        if undecided and reason is None:
            reason = "undecided"
            needed = [samples_needed(part, limit, confidence) for part in undecided]
    bound = worst(bounds, default=None)
    return GateResult(
        name=name,
        limit=limit,
        value=value,
        passed=reason is None,
        reason=reason,
        confidence=confidence if bounds else None,
        bound=bound,
        samples=None if bound is None else evidence[bounds.index(bound)].samples,
        samples_needed=None if None in needed else max(filter(None, needed), default=None),
    )


def _of_classes(figure: str, part: Any, samples: int) -> Evidence | None:
    """Return the evidence for a figure in a part of an evaluation; None if the figure is exact."""
    if figure == "accuracy_drop":
        return of_drop(part.outcomes)
    if figure in ("accuracy", "agreement"):
        return of_share(round(getattr(part, figure) * samples), samples)
    return None
