"""Intervals and tests for accuracies of models on the same inputs; no torch."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def wilson(successes: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927).

    Args:
        successes, trials: of independent trials, at least one.

    Returns:
        Lower and upper bound, in 0…1.

    >>> [round(bound, 4) for bound in wilson(95, 100)]
    [0.8882, 0.9785]
    """
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2) / shrink
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


def paired_difference(
    both: int, only_first: int, only_second: int, neither: int, z: float = Z95
) -> tuple[float, float]:
    """Interval of the difference of two shares measured on the same trials (first minus second).

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions
    based on paired data", method 10.

    Args:
        both, only_first, only_second, neither: numbers of trials with success of both, and so on.

    Returns:
        Lower and upper bound, in -1…1.
    """
    trials = both + only_first + only_second + neither
    first, second = (both + only_first) / trials, (both + only_second) / trials
    (low1, high1), (low2, high2) = wilson(first * trials, trials, z), wilson(second * trials, trials, z)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    correlation = 0.0
    if product:
        covariance = float(both * neither - only_first * only_second)
        if covariance > 0:
            covariance = max(0.0, covariance - trials / 2)
        correlation = covariance / math.sqrt(product)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = first - second
    lower = difference - distance(first - low1, high2 - second)
    upper = difference + distance(high1 - first, second - low2)
    return max(-1.0, lower), min(1.0, upper)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: that two models that differ on these inputs are equally good.

    >>> round(mcnemar(1, 5), 5)
    0.21875
    """
    trials, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    logs = (
        math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) - trials * math.log(2)
        for i in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(math.exp(log) for log in logs))
