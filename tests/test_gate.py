"""Gates with confidence: bounds against SciPy, published figures and simulation, and eval's verdicts."""

import json
import operator
import random
from itertools import product

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest, bootstrap, norm

import moeprune
from moeprune.evaluation.evaluate import predict
from moeprune.evaluation.gates import judge, of_drop, of_median, of_share, samples_needed
from moeprune.evaluation.intervals import drop_at_most, median_at_least, paired_difference, share_at_least
from moeprune.evaluation.results import Outcomes
from tests.results import evaluation

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.9999)
OF_BOUNDS = operator.attrgetter("confidence", "bound", "samples", "samples_needed")


def of_table(both, lost, won, neither):
    return of_drop(Outcomes(both=both, lost=lost, won=won, neither=neither))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("right", "samples"),
    [(0, 1), (1, 1), (0, 9), (9, 9), (1, 30), (3, 7), (95, 100), (1, 1000), (539, 540), (78_123, 100_000)],
)
def test_bound_of_a_share_is_scipys_exact_one(right, samples, level):
    exact = binomtest(right, samples, alternative="greater").proportion_ci(level, method="exact").low
    assert share_at_least(right, samples, level) == pytest.approx(exact, rel=1e-9, abs=1e-12)
    assert of_share(right, samples).bound(level) == share_at_least(right, samples, level)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("samples", [1, 5, 20, 100])
def test_a_share_below_its_limit_passes_no_more_often_than_the_level_says(samples, level):
    """By exact enumeration at the worst true shares, those right at a bound."""
    counts = np.arange(samples + 1)
    bounds = np.array([share_at_least(int(right), samples, level) for right in counts])
    for share in bounds[1:]:
        assert binom.pmf(counts, samples, share)[bounds >= share].sum() <= 1 - level + 1e-9


def test_bound_of_a_drop_is_the_end_of_the_published_two_sided_interval_at_twice_the_error():
    """Newcombe 1998; and Altman et al. 2000, table 6.2, where nothing is won: 5 lost of 41 are exact."""
    assert of_table(36, 12, 2, 0).bound(0.975) == pytest.approx(0.3404, abs=5e-5)
    exact = binomtest(5, 41, alternative="less").proportion_ci(0.975, method="exact").high
    assert of_table(14, 5, 0, 22).bound(0.975) == pytest.approx(exact)
    assert exact > 0.2265
    assert of_table(0, 7, 0, 0).bound(0.95) == 1
    assert of_table(400, 10, 60, 61).bound(0.95) < 0  # a better model, for sure


@pytest.mark.parametrize(
    "table", [(1, 0, 0, 0), (0, 0, 0, 1), (80, 0, 0, 0), (0, 0, 0, 80), (70, 0, 0, 10), (97, 3, 0, 0)]
)
def test_without_a_won_input_the_bound_of_a_drop_is_never_below_the_exact_one(table):
    """No input that only one model predicts right shows little where there are few inputs."""
    for level in LEVELS:
        samples, lost = sum(table), table[1]
        exact = beta.ppf(level, lost + 1, samples - lost) if lost < samples else 1
        assert of_table(*table).bound(level) >= exact - 1e-9
    assert of_table(*table).bound(0.95) > (0.9 if sum(table) == 1 else 0.036)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_a_drop_beyond_its_limit_passes_about_as_rarely_as_the_level_says(level):
    """By simulation, at a true drop right at the limit, from models that hardly differ to ones that do."""
    generator = np.random.default_rng(0)
    rates = []
    for samples in (100, 531):
        for full, limit, won in (
            (0.98, 0.01, 0.002), (0.98, 0.01, 0.01), (0.95, 0.02, 0.01), (0.9, 0.05, 0.005),
            (0.75, 0.02, 0.06), (1.0, 0.02, 0.0), (1.0, 0.005, 0.0), (0.5, 0.02, 0.0),
        ):  # fmt: skip
            lost = limit + won
            shares = (full - lost, lost, won, 1 - full - won)
            drawn = generator.multinomial(samples, shares, 1000)
            tables, counts = np.unique(drawn, axis=0, return_counts=True)
            passes = [drop_at_most(*map(int, table), level) <= limit for table in tables]
            rates.append(counts[passes].sum() / 1000)
    assert max(rates) < 1.35 * (1 - level) + 0.01
    assert np.mean(rates) > 0.25 * (1 - level)


def test_bound_of_a_drop_on_real_predictions_is_near_a_paired_bootstraps(single):
    model = moeprune.load(single)
    models = [model, moeprune.prune(model, keep="1/8", scope="input", signal="combine", compensate="none")]
    data = moeprune.open_data("digits:test", model.input_format)
    full, pruned = (found.correct.numpy().astype(float) for found in predict(models, data, moeprune.Runtime("cpu")))
    pruned = pruned * (np.arange(len(pruned)) % 9 > 0)  # a clear drop: a bootstrap is good for no other
    cells = [int(((full == f) & (pruned == p)).sum()) for f, p in ((1, 1), (1, 0), (0, 1), (0, 0))]
    for level in (0.9, 0.95, 0.99):
        found = bootstrap(
            (full, pruned), lambda f, p, axis: (f - p).mean(axis), paired=True, vectorized=True,
            confidence_level=level, alternative="less", method="BCa", n_resamples=4000,
            rng=np.random.default_rng(0),
        ).confidence_interval.high  # fmt: skip
        assert of_table(*cells).bound(level) == pytest.approx(found, abs=0.004)
        assert of_table(*cells).bound(level) > (full - pruned).mean()


def test_bound_of_a_median_is_the_order_statistic_of_the_binomial_distribution():
    generator = np.random.default_rng(0)
    for count in (1, 4, 5, 7, 8, 57, 200):
        values = generator.lognormal(size=count)
        for level in LEVELS:
            allowed = [rank for rank in range(count) if binom.cdf(rank, count, 0.5) <= 1 - level + 1e-15]
            assert median_at_least(list(values), level) == (np.sort(values)[allowed[-1]] if allowed else 0)


def test_bound_of_a_median_lies_above_it_as_rarely_as_the_level_says():
    generator = np.random.default_rng(1)
    for count, level in ((7, 0.9), (20, 0.95), (60, 0.95)):
        draws = generator.lognormal(size=(2000, count))  # a median of 1
        above = np.mean([median_at_least(list(values), level) > 1 for values in draws])
        rates = binom.cdf(range(count), count, 0.5)
        assert above == pytest.approx(rates[rates <= 1 - level].max(), abs=0.015)


def observations(seed):
    """Yield random evidence of each kind, as a function of how many times as many samples there are.

    With it come a limit that its value keeps by some margin, and whether the limit is a maximum.
    """
    generator = random.Random(seed)
    samples = generator.choice([1, 7, 40, 300, 3000])
    right = round(samples * generator.uniform(0.5, 1))
    limit = right / samples - generator.uniform(0.01, 0.1)
    yield lambda times: of_share(times * right, times * samples), limit, False
    both = generator.randint(0, samples)
    lost = generator.randint(0, (samples - both) // 4)
    won = generator.randint(0, (samples - both) // 4)
    cells = both, lost, won, samples - both - lost - won
    limit = (lost - won) / samples + generator.uniform(0.01, 0.1)
    yield lambda times: of_table(*(times * cell for cell in cells)), limit, True
    values = [generator.lognormvariate(0.5, 0.3) for _ in range(generator.choice([7, 20, 101]))]
    yield lambda times: of_median(values * times), sorted(values)[len(values) // 3], False


@pytest.mark.parametrize("seed", range(20))
def test_bounds_are_against_the_model_the_more_so_the_higher_the_level(seed):
    for of, limit, is_maximum in observations(seed):
        evidence = of(1)
        bounds = [evidence.bound(level) for level in LEVELS]
        assert bounds == sorted(bounds, reverse=not is_maximum)
        for level, bound in zip(LEVELS, bounds, strict=True):
            assert evidence.keeps(limit, level, evidence.samples) is (bound <= limit if is_maximum else bound >= limit)


@pytest.mark.parametrize("seed", range(20))
def test_so_many_samples_as_are_needed_decide_and_one_fewer_does_not(seed):
    for (of, limit, is_maximum), level in product(observations(seed), (0.8, 0.95, 0.99)):
        evidence = of(1)
        if evidence.keeps(limit, level, evidence.samples):
            continue
        needed = samples_needed(evidence, limit, level)
        assert needed > evidence.samples
        assert evidence.keeps(limit, level, needed)
        assert not evidence.keeps(limit, level, needed - 1)
        bound = of(-(-needed // evidence.samples)).bound(level)
        assert bound <= limit if is_maximum else bound >= limit


def test_samples_needed_are_those_of_the_formula_where_there_is_one():
    """All right: 0.98^149 is the first power below 5 %. No input that differs: the same of one per cent."""
    assert samples_needed(of_share(10, 10), 0.98, 0.95) == 149
    assert samples_needed(of_table(10, 0, 0, 0), 0.01, 0.95) == 299
    assert samples_needed(of_median([2.0]), 1.0, 0.95) == 5
    share, limit = 0.9, 0.89
    approximate = norm.ppf(0.95) ** 2 * share * (1 - share) / (share - limit) ** 2
    assert samples_needed(of_share(90, 100), limit, 0.95) == pytest.approx(approximate, rel=0.15)


@pytest.mark.parametrize(
    ("evidence", "limit"),
    [
        (of_share(10, 10), 1.0), (of_share(90, 100), 0.9), (of_table(90, 0, 0, 10), 0.0),
        (of_table(90, 3, 2, 5), 0.01), (of_median([1.0, 1.0, 2.0, 2.0]), 1.5),
    ],
)  # fmt: skip
def test_no_number_of_samples_shows_what_is_met_exactly(evidence, limit):
    assert samples_needed(evidence, limit, 0.95) is None


def test_a_gate_is_missed_undecided_or_passed():
    limits = {"min_accuracy": 0.9}
    for right, reason in ((89, "missed"), (91, "undecided"), (97, None)):
        [gate] = judge(evaluation(right, 0), limits, 0.95)
        assert (gate.reason, gate.passed) == (reason, reason is None)
        assert gate.bound == share_at_least(right, 100, 0.95) < gate.value
        assert (gate.confidence, gate.samples) == (0.95, 100)
        assert (gate.samples_needed is not None) is (reason == "undecided")
        [without] = judge(evaluation(right, 0), limits)
        assert without.passed is (reason != "missed")
        assert OF_BOUNDS(without) == (None,) * 4


def test_a_drop_is_judged_on_the_same_inputs():
    [gate] = judge(evaluation(90, 1), {"max_accuracy_drop": 0.02}, 0.95)
    assert gate.value == 0.01
    assert gate.bound >= paired_difference(90, 1, 0, 9, norm.ppf(0.95))[1]
    assert gate.reason == "undecided"


def test_exact_figures_are_judged_as_they_are():
    gates = judge(evaluation(90, 1), {"min_size_reduction": 0.5, "min_flops_reduction": 0.26}, 0.95)
    assert [(gate.name, gate.passed, gate.reason) for gate in gates] == [
        ("min_flops_reduction", False, "missed"), ("min_size_reduction", True, None),
    ]  # fmt: skip
    assert all(OF_BOUNDS(gate) == (None,) * 4 for gate in gates)


@pytest.fixture(scope="module")
def pruned(single, single_analysis, made):
    """`single` with 1/8 of its experts, repaired."""
    return made(f"prune {single} --analysis {single_analysis} --keep 1/8 --signal gram --compensate affine")


@pytest.mark.parametrize(("limit", "passed"), [("--limit 100", False), ("", True)])
def test_a_hundred_digits_cannot_show_what_all_of_them_do(limit, passed, pruned, single, run):
    gates = "--max-accuracy-drop 0.015 --min-accuracy 0.95 --min-size-reduction 0.5"
    call = f"eval {pruned} --data digits --baseline {single} {limit} {gates}"
    result = run(f"{call} --confidence 0.95 --output-format json")
    found = json.loads(result.stdout)
    gates = {gate["name"]: gate for gate in found["gates"]}
    assert result.code == (0 if passed else 1)
    assert found["passed"] is passed
    drop = gates["max_accuracy_drop"]
    assert drop["reason"] == (None if passed else "undecided")
    assert drop["value"] <= 0.015
    assert (drop["bound"] <= 0.015) is passed
    assert drop["bound"] == drop_at_most(**found["difference"]["outcomes"], confidence=0.95)
    assert drop["samples"] == found["data"]["samples"]
    assert gates["min_size_reduction"]["passed"]
    cells = found["difference"]["outcomes"]
    assert found["model"]["accuracy"] == (cells["both"] + cells["won"]) / sum(cells.values())
    assert len(found["forgetting"]["lost"]) == cells["lost"]
    text = run(f"{call} --confidence 0.95").stdout
    assert ("FAILED: 100 samples cannot show it, about" in text) is not passed
    assert "bound at 95 %" in text
    assert run(call).code == 0


def test_a_limit_that_is_met_exactly_is_undecided_and_a_missed_one_failed(single, run):
    call = f"eval {single} --data digits --confidence 0.9"
    result = run(f"{call} --baseline {single} --limit 50 --max-accuracy-drop 0")
    assert result.code == 1
    assert "FAILED: 50 samples cannot show it, nor would more like them" in result.stdout
    missed = run(f"{call} --min-accuracy 0.99")
    assert (missed.code, missed.stdout.split()[-1]) == (1, "FAILED")
