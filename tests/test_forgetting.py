"""What pruning forgets, against plain counting."""

import random

import pytest
import torch

from moeprune.evaluation.evaluate import forgetting
from moeprune.evaluation.intervals import paired_difference


def case(seed: int, samples=400, classes=6) -> tuple[list[int], list[int], list[int]]:
    """Labels, and predictions of a pruned and a full model; class 5 has no samples."""
    rng = random.Random(seed)
    labels = [rng.randrange(classes - 1) for _ in range(samples)]
    full = [label if rng.random() < 0.9 else rng.randrange(classes) for label in labels]
    pruned = [guess if rng.random() < 0.85 else rng.randrange(classes) for guess in full]
    return labels, pruned, full


def found_of(labels, pruned, full):
    return forgetting(torch.tensor(labels), torch.tensor(pruned), torch.tensor(full))


@pytest.mark.parametrize("seed", range(3))
def test_classes_and_flips_equal_plain_counts(seed):
    labels, pruned, full = case(seed)
    found = found_of(labels, pruned, full)
    rows = list(zip(labels, pruned, full, strict=True))
    assert found.lost == [i for i, (y, p, f) in enumerate(rows) if f == y != p]
    assert found.won == [i for i, (y, p, f) in enumerate(rows) if p == y != f]
    assert sorted(entry.index for entry in found.classes) == sorted(set(labels))
    drops = [entry.accuracy_drop for entry in found.classes]
    assert drops == sorted(drops, reverse=True)
    for entry in found.classes:
        own = [(y == p, y == f) for y, p, f in rows if y == entry.index]
        assert entry.samples == len(own)
        assert entry.accuracy == pytest.approx(sum(p for p, _ in own) / len(own))
        assert entry.baseline_accuracy == pytest.approx(sum(f for _, f in own) / len(own))
        assert entry.accuracy_drop == pytest.approx(entry.baseline_accuracy - entry.accuracy)
        cells = [own.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))]
        assert entry.accuracy_drop_ci95 == paired_difference(*cells)


@pytest.mark.parametrize(
    ("forgotten", "samples_of_class", "collapsed"),
    [(20, 20, [7]), (15, 20, [7]), (4, 20, []), (1, 1, []), (0, 20, [])],  # one sample shows nothing
)
def test_a_class_that_the_average_hides_is_named(forgotten, samples_of_class, collapsed):
    """All is right but for so many samples of class 7 of 50."""
    labels = [c for c in range(50) for _ in range(samples_of_class)]
    pruned = list(labels)
    first = 7 * samples_of_class
    pruned[first : first + forgotten] = [8] * forgotten
    assert found_of(labels, pruned, labels).collapsed == collapsed


def test_chance_names_no_class():
    assert not any(found_of(*case(seed)).collapsed for seed in range(20))


def test_a_class_that_the_full_model_does_not_know_cannot_collapse():
    labels = [0] * 100 + [1] * 100
    assert found_of(labels, [1] * 200, [0] * 30 + [1] * 70 + [1] * 100).collapsed == []


@pytest.mark.parametrize(
    "pruned_of", [lambda c: c if c >= 3 else 9, lambda c: (c + 1) % 10], ids=["three of ten", "all"]
)
def test_where_the_average_shows_it_no_class_stands_out(pruned_of):
    labels = [c for c in range(10) for _ in range(40)]
    assert found_of(labels, [pruned_of(c) for c in labels], labels).collapsed == []
