"""Which experts a static set keeps by a Gram matrix, against brute force."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from moeprune.calibration.selection import best_kept, drop_order

WAYS = [(0, False), (1, False), (0, True)]  # what is lost in any case; whether the kept mass divides the error


def problem(n: int, always: int, with_mass: bool, seed: int) -> tuple[Tensor, Tensor | None]:
    """The Gram matrix of contributions that have much in common, and masses."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(n + always, 6, generator=generator, dtype=torch.float64)
    parts *= torch.rand(n + always, 1, generator=generator, dtype=torch.float64) + 0.1
    mass = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)
    gram = parts @ parts.mT + 0.01 * torch.eye(n + always, dtype=torch.float64)
    return gram, mass if with_mass else None


def error(gram: Tensor, n: int, mass: Tensor | None, dropped) -> float:
    lost = [*dropped, *range(n, len(gram))]
    found = float(sum(gram[i, j] for i in lost for j in lost))
    return found if mass is None else found / max(1 - sum(float(mass[j]) for j in dropped), 1e-12) ** 2


@pytest.mark.parametrize(("always", "with_mass"), WAYS)
def test_each_expert_that_is_dropped_adds_least_error(always, with_mass):
    n = 7
    gram, mass = problem(n, always, with_mass, seed=1)
    order, errors = drop_order(gram, n, mass)
    assert sorted(order) == list(range(n))
    for count in range(n if with_mass else n + 1):
        assert errors[count] == pytest.approx(error(gram, n, mass, order[:count]), abs=1e-9)
        nexts = order[count - 1 :] if count else []
        others = [error(gram, n, mass, [*order[: count - 1], j]) for j in nexts]
        assert errors[count] <= min(others, default=errors[count]) + 1e-9


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize(("always", "with_mass"), WAYS)
def test_no_exchange_betters_the_kept_experts_and_few_sets_are_better_at_all(k, always, with_mass):
    if with_mass and k in (0, 8):
        pytest.skip("nothing to choose, or no mass is kept")
    n, best = 8, 0
    for seed in range(20):
        gram, mass = problem(n, always, with_mass, seed)
        kept = best_kept(gram, n, k, mass)
        assert len(kept) == k
        assert list(kept) == sorted(set(kept))
        dropped = set(range(n)) - set(kept)
        found = error(gram, n, mass, dropped)
        slack = 1e-6 * found if with_mass else 1e-9
        for out in dropped:
            for into in kept:
                assert error(gram, n, mass, dropped - {out} | {into}) >= found - slack
        best += found <= min(error(gram, n, mass, rest) for rest in combinations(range(n), n - k)) + slack
    assert best >= 16


def test_independent_experts_are_kept_by_their_own_error_and_the_heavier_of_equals():
    assert best_kept(torch.diag(torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0, 2.0])), 6, 3) == (0, 2, 4)
    assert best_kept(torch.eye(3), 3, 1, torch.tensor([0.2, 0.5, 0.3])) == (1,)


def test_what_is_lost_in_any_case_changes_the_choice():
    """The first expert makes up for what is missing already."""
    gram = torch.tensor([[4.0, 0.0, -3.0], [0.0, 1.0, 0.0], [-3.0, 0.0, 4.0]])
    assert best_kept(gram[:2, :2], 2, 1) == (0,)
    assert best_kept(gram, 2, 1) == (1,)
