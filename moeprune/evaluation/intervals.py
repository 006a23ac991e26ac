"""Intervals and tests for accuracies of models on the same inputs; no torch."""

import math
from collections.abc import Sequence
from statistics import NormalDist

Z95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a share of independent trials (Wilson 1927).

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


def simultaneous_quantile(level: float, intervals: int) -> float:
    """Return the normal quantile of two-sided intervals with this simultaneous level (Bonferroni)."""
    return NormalDist().inv_cdf(1 - (1 - level) / 2 / intervals)


def paired_difference(
    both: float, only_first: float, only_second: float, neither: float, z: float = Z95
) -> tuple[float, float]:
    """Return the interval of the difference of two shares (first - second) from counts of the same trials.

    Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on paired data",
    method 10.
    """
    trials = both + only_first + only_second + neither
    first, second = (both + only_first) / trials, (both + only_second) / trials
    (low1, high1), (low2, high2) = wilson(first * trials, trials, z), wilson(second * trials, trials, z)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(0.0, covariance - trials / 2)
    correlation = covariance / math.sqrt(product) if product else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    difference = first - second
    lower = difference - distance(first - low1, high2 - second)
    upper = difference + distance(high1 - first, second - low2)
    return max(-1.0, lower), min(1.0, upper)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p of McNemar's exact test that two models are equally good on these inputs.

    >>> round(mcnemar(1, 5), 5)
    0.21875
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_first, only_second), only_first + only_second, 0.5)))


def share_at_least(successes: float, trials: float, confidence: float) -> float:
    """Return the exact one-sided lower bound of a share of independent trials (Clopper and Pearson 1934).

    Successes and trials may be fractional, to extrapolate rates to other numbers of trials.

    >>> round(share_at_least(100, 100, 0.95), 4)
    0.9705
    """
    from scipy.special import betaincinv

    return float(betaincinv(successes, trials - successes + 1, 1 - confidence)) if successes > 0 else 0.0


def drop_at_most(both: float, lost: float, won: float, neither: float, confidence: float) -> float:
    """Return the one-sided upper bound of an accuracy drop, from counts as in `Outcomes`.

    It is the end of Newcombe's interval, but at least the exact bound of a share of `lost - won` inputs: if
    few inputs are lost and none is won, Newcombe's bound lies below the true drop too often.
    """
    bound = paired_difference(both, lost, won, neither, NormalDist().inv_cdf(confidence))[1]
    if lost >= won:
        samples = both + lost + won + neither
        bound = max(bound, 1 - share_at_least(samples - (lost - won), samples, confidence))
    return bound


def mean_at_most(samples: int, mean: float, deviation: float, confidence: float) -> float:
    """Return Student's one-sided upper bound of a mean of at least two independent samples (Student 1908).

    deviation: their standard deviation, with n - 1.

    >>> round(mean_at_most(10, 5.0, 2.0, 0.975), 4)
    6.4307
    """
    from scipy.special import stdtrit

    return mean + float(stdtrit(samples - 1, confidence)) * deviation / math.sqrt(samples)


def median_at_least(values: Sequence[float], confidence: float) -> float:
    """Return the one-sided lower bound of the median of what positive values are drawn from (Thompson 1936).

    The largest value whose rank exceeds the median with probability at most `1 - confidence`, for any distribution of
    independent values; 0 if there are too few values.

    >>> median_at_least([1.7, 1.1, 1.3, 1.2, 1.5], 0.95)
    1.1
    >>> median_at_least([1.7, 1.1, 1.3, 1.2], 0.95)
    0.0
    """
    from scipy.special import bdtr

    ordered = sorted(values)
    ranks = bdtr(range(len(ordered)), len(ordered), 0.5)  # P(at most so many values are below the median)
    below = [value for value, rank in zip(ordered, ranks, strict=True) if rank <= 1 - confidence + 1e-15]
    return below[-1] if below else 0.0
