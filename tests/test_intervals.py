from itertools import product

import pytest
from scipy.stats import binom, binomtest, multinomial

from moeprune.evaluation.intervals import mcnemar, paired_difference, wilson

Z90 = 1.6448536269514722


@pytest.mark.parametrize(("z", "level"), [(1.959963984540054, 0.95), (Z90, 0.9)])
@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 10), (10, 10), (3, 7), (95, 100), (1, 1000), (539, 540)]
)
def test_wilson_interval_equals_scipys(successes, trials, z, level):
    expected = binomtest(successes, trials).proportion_ci(level, method="wilson")
    low, high = wilson(successes, trials, z)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)


def test_wilson_interval_of_no_and_of_all_successes_ends_at_the_share():
    for trials in range(1, 200):
        assert wilson(0, trials)[0] == 0
        assert wilson(trials, trials)[1] == 1


@pytest.mark.parametrize("trials", [5, 20, 60])
def test_wilson_interval_covers_the_true_share_about_as_often_as_it_says(trials):
    """By exact enumeration: on average over all true shares 95 %, and never below four fifths."""
    intervals = [wilson(successes, trials) for successes in range(trials + 1)]
    coverage = []
    for share in (i / 200 for i in range(1, 200)):
        inside = [x for x, (low, high) in enumerate(intervals) if low <= share <= high]
        coverage.append(binom.pmf(inside, trials, share).sum())
    assert sum(coverage) / len(coverage) == pytest.approx(0.95, abs=0.015)
    assert min(coverage) > 0.8


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998; a negative correlation
        ((14, 5, 0, 22), 0.0115, 0.2265),  # Altman et al. 2000, table 6.2; a positive one
        ((1, 1, 7, 12), -0.5069, -0.0256),  # Bentur et al. 2009; one that the correction takes to zero
    ],
)
def test_paired_difference_equals_published_intervals(table, low, high):
    assert paired_difference(*table) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference_of_swapped_models_is_mirrored():
    for both, first, second, neither in product((0, 3, 40), repeat=4):
        if both + first + second + neither:
            low, high = paired_difference(both, first, second, neither)
            assert paired_difference(both, second, first, neither) == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize(
    ("table", "difference"),
    [
        ((1, 0, 0, 0), 0.0), ((0, 0, 0, 1), 0.0), ((0, 1, 0, 0), 1.0), ((0, 0, 1, 0), -1.0),
        ((50, 0, 0, 0), 0.0), ((0, 0, 0, 50), 0.0), ((0, 50, 0, 0), 1.0), ((97, 3, 0, 0), 0.03),
        ((400, 0, 0, 140), 0.0),
    ],
)  # fmt: skip
def test_paired_difference_of_extreme_tables_holds_the_difference(table, difference):
    low, high = paired_difference(*table)
    assert -1 <= low <= difference <= high <= 1
    assert low < high


def test_paired_difference_narrows_where_models_are_right_on_the_same_inputs():
    """The same two accuracies, 0.9 and 0.9: with ever fewer inputs on which only one is right."""
    widths = []
    for differing in (90, 45, 5, 0):
        low, high = paired_difference(900 - differing, differing, differing, 100 - differing)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 4


@pytest.mark.parametrize(
    "shares", [(0.7, 0.1, 0.1, 0.1), (0.5, 0.2, 0.05, 0.25), (0.25, 0.25, 0.25, 0.25), (0.85, 0.05, 0.02, 0.08)]
)
def test_paired_difference_covers_the_true_difference(shares):
    """By exact enumeration of all tables of 12 inputs."""
    tables = [table for table in product(range(13), repeat=4) if sum(table) == 12]
    intervals = [paired_difference(*table) for table in tables]
    inside = [low <= shares[1] - shares[2] <= high for low, high in intervals]
    assert 0.93 < multinomial.pmf(tables, 12, shares)[inside].sum() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("first", "second"),
    [(0, 0), (1, 0), (0, 1), (5, 5), (1, 5), (10, 3), (3, 10), (40, 61), (300, 250), (0, 50), (60, 2), (900, 100)],
)
def test_mcnemar_equals_scipys_exact_binomial_test_and_is_never_zero(first, second):
    """Two-sided p of 2^-49 for 50 of 50, not 0: a p-value of exactly 0 does not exist."""
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9, abs=0)
