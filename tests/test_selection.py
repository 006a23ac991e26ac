"""Which experts a static set keeps by a Gram matrix, against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from moeprune.calibration.selection import best_kept, drop_order


def random_gram(n: int, always: int, seed: int) -> Tensor:
    """Of contributions that have much in common."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(n + always, 6, generator=generator, dtype=torch.float64)
    parts *= torch.rand(n + always, 1, generator=generator, dtype=torch.float64) + 0.1
    return parts @ parts.mT + 0.01 * torch.eye(n + always, dtype=torch.float64)


def error(gram: Tensor, n: int, dropped) -> float:
    lost = [*dropped, *range(n, len(gram))]
    return float(sum(gram[i, j] for i in lost for j in lost))


@pytest.mark.parametrize("always", [0, 1])
def test_each_expert_that_is_dropped_adds_least_error(always):
    n, gram = 7, random_gram(7, always, seed=1)
    order, errors = drop_order(gram, n)
    assert sorted(order) == list(range(n))
    for count in range(n + 1):
        assert errors[count] == pytest.approx(error(gram, n, order[:count]), abs=1e-9)
        others = [error(gram, n, [*order[: count - 1], j]) for j in order[count - 1 :]] if count else []
        assert errors[count] <= min(others, default=errors[count]) + 1e-9


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("always", [0, 1])
def test_no_exchange_betters_the_kept_experts_and_few_sets_are_better_at_all(k, always):
    n, best = 8, 0
    for seed in range(20):
        gram = random_gram(n, always, seed)
        kept = best_kept(gram, n, k)
        assert len(kept) == k
        assert list(kept) == sorted(set(kept))
        dropped = set(range(n)) - set(kept)
        found = error(gram, n, dropped)
        for out in dropped:
            for into in kept:
                assert error(gram, n, dropped - {out} | {into}) >= found - 1e-9
        least = min(error(gram, n, rest) for rest in combinations(range(n), n - k))
        best += found <= least + 1e-9
    assert best >= 16


def test_independent_experts_are_kept_by_their_own_error():
    gram = torch.diag(torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0]))
    assert best_kept(gram, 6, 3) == (0, 2, 4)


def test_what_is_lost_in_any_case_changes_the_choice():
    """The first expert makes up for what is missing already."""
    gram = torch.tensor([[4.0, 0.0, -3.0], [0.0, 1.0, 0.0], [-3.0, 0.0, 4.0]])
    assert best_kept(gram[:2, :2], 2, 1) == (0,)
    assert best_kept(gram, 2, 1) == (1,)


def test_equal_experts_are_kept_the_same_way_each_time():
    assert best_kept(torch.ones(5, 5), 5, 2) == best_kept(torch.ones(5, 5), 5, 2)
    assert best_kept(torch.zeros(5, 5), 5, 2) == best_kept(torch.zeros(5, 5), 5, 2)


def renormed_error(gram: Tensor, n: int, mass: Tensor, dropped) -> float:
    left = 1 - sum(float(mass[j]) for j in dropped)
    return error(gram, n, dropped) / max(left, 1e-12) ** 2


@pytest.mark.parametrize("k", range(1, 8))
def test_the_mass_that_is_kept_divides_the_error(k):
    n, best = 8, 0
    for seed in range(20):
        gram = random_gram(n, 0, seed)
        mass = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)
        order, errors = drop_order(gram, n, mass)
        assert errors[n - k] == pytest.approx(renormed_error(gram, n, mass, order[: n - k]))
        kept = best_kept(gram, n, k, mass)
        dropped = set(range(n)) - set(kept)
        found = renormed_error(gram, n, mass, dropped)
        for out in dropped:
            for into in kept:
                assert renormed_error(gram, n, mass, dropped - {out} | {into}) >= found * (1 - 1e-6)
        least = min(renormed_error(gram, n, mass, rest) for rest in combinations(range(n), n - k))
        best += found <= least * (1 + 1e-6)
    assert best >= 16


def test_of_two_experts_that_lose_the_same_the_lighter_one_is_dropped():
    gram = torch.eye(3)
    assert best_kept(gram, 3, 1, torch.tensor([0.2, 0.5, 0.3])) == (1,)
