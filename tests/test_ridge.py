"""Ridge regression from sums, against least squares on the rows themselves and a grid of all lambdas."""

from itertools import product

import numpy as np
import pytest
import torch

from moeprune.calibration.ridge import EXPONENTS, ROUNDING, TOLERANCE, Equations, sketch, solve_held_out

LAMBDAS = [10.0**exponent for exponent in range(EXPONENTS[0], EXPONENTS[1] + 1)]


def halves(R: np.ndarray, T: np.ndarray) -> tuple[Equations, Equations]:
    """The normal equations of the even and of the odd rows."""
    rows = [(torch.from_numpy(R[half::2]), torch.from_numpy(T[half::2])) for half in (0, 1)]
    first, second = (Equations(r.mT @ r, r.mT @ t, float(t.square().sum())) for r, t in rows)
    return first, second


def column_scale(R: np.ndarray) -> np.ndarray:
    """What the columns of one kind are divided by."""
    norms = np.linalg.norm(R, axis=0)
    return np.maximum(norms, 0.01 * norms.max(initial=0))


def scale_of_kinds(R: np.ndarray, kinds: list[int]) -> np.ndarray:
    return np.concatenate([column_scale(part) for part in np.split(R, np.cumsum(kinds)[:-1], axis=1)])


def direct_ridge(R: np.ndarray, T: np.ndarray, ridge: float | np.ndarray, scale: np.ndarray) -> np.ndarray:
    """argmin over V of |T - R·V|² + sum over columns of ridge·|scale·V|², by least squares on the rows themselves."""
    q = R.shape[1]
    rows = np.vstack([R / scale, np.diag(np.sqrt(ridge) * np.ones(q))])
    goals = np.vstack([T, np.zeros((q, T.shape[1]))])
    return np.linalg.lstsq(rows, goals, rcond=None)[0] / scale[:, None]


def errors_of(R: np.ndarray, T: np.ndarray, ridge: float | np.ndarray, scale: np.ndarray) -> tuple[float, float]:
    """Squared errors of fits to the even and to the odd rows: on these rows, and on the others."""
    own = other = 0.0
    for half in (0, 1):
        V = direct_ridge(R[half::2], T[half::2], ridge / 2, scale)
        own += np.square(T[half::2] - R[half::2] @ V).sum()
        other += np.square(T[1 - half :: 2] - R[1 - half :: 2] @ V).sum()
    return own, other


def problem(rows: int, columns: int, targets: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Regressors of very different strength, and noisy targets."""
    rng = np.random.default_rng(seed)
    R = rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-1, 1, size=columns)
    return R, R @ rng.normal(size=(columns, targets)) + noise * rng.normal(size=(rows, targets))


def two_kinds(targets: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Few columns that explain the targets well, and many that explain them hardly."""
    rng = np.random.default_rng(seed)
    strong, weak = rng.normal(size=(120, 6)), 30 * rng.normal(size=(120, 50))
    T = strong @ rng.normal(size=(6, targets)) + weak @ (4e-3 * rng.normal(size=(50, targets)))
    return np.hstack([strong, weak]), T + 0.5 * rng.normal(size=T.shape), [6, 50]


def test_noiseless_linear_targets_are_met_but_for_what_a_stronger_ridge_may_cost():
    R, T = problem(rows=200, columns=8, targets=3, noise=0)
    missed = np.square(R @ solve_held_out(halves(R, T)).solution.numpy() - T).sum() / np.square(T).sum()
    assert missed < 1.5 * ROUNDING


def test_noise_is_not_fitted():
    R, _ = problem(rows=100, columns=30, targets=5, noise=0)
    T = np.random.default_rng(1).normal(size=(100, 5))
    fitted = R @ solve_held_out(halves(R, T)).solution.numpy()
    overfitted = R @ np.linalg.lstsq(R, T, rcond=None)[0]
    assert np.linalg.norm(overfitted) > 0.4 * np.linalg.norm(T)
    assert np.linalg.norm(fitted) < 0.02 * np.linalg.norm(T)


@pytest.mark.parametrize("kinds", [None, [2, 4]])
def test_nothing_is_added_where_every_ridge_does_harm(kinds):
    """What one half says of the targets is the opposite of what the other says, and stronger."""
    R = np.repeat(problem(rows=50, columns=6, targets=2, noise=0)[0], 2, axis=0)
    T = R @ np.ones((6, 2)) * np.tile([1.0, -0.5], 50)[:, None]
    found = solve_held_out(halves(R, T), kinds)
    assert torch.equal(found.solution, torch.zeros(6, 2, dtype=torch.float64))
    assert found.ridges is None
    assert found.fitted == found.held_out == pytest.approx(np.square(T).sum())


@pytest.mark.parametrize("noise", [6.0, 10.0, 14.0])
def test_the_strength_is_the_strongest_that_costs_little(noise):
    R, T = problem(rows=80, columns=30, targets=4, noise=noise)
    scale = column_scale(R)
    errors = [errors_of(R, T, ridge, scale)[1] for ridge in LAMBDAS]
    square, least = np.square(T).sum(), min(errors)
    enough = least + TOLERANCE * min(least, square - least) + ROUNDING * square
    strongest = max(ridge for ridge, error in zip(LAMBDAS, errors, strict=True) if error <= enough)
    assert LAMBDAS[0] < strongest < LAMBDAS[-1]
    assert least < square
    found = solve_held_out(halves(R, T))
    assert found.ridges.tolist() == pytest.approx([strongest] * 30)


@pytest.mark.parametrize("targets", [4, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_strength_for_each_group_is_better_than_the_best_shared_one(seed, targets):
    """With many targets the strengths are chosen by mixtures of them."""
    R, T, kinds = two_kinds(targets, seed)
    scale = scale_of_kinds(R, kinds)
    grid = {pair: errors_of(R, T, np.repeat(pair, kinds), scale)[1] for pair in product(LAMBDAS, LAMBDAS)}
    shared, best = min(grid[ridge, ridge] for ridge in LAMBDAS), min(grid.values())
    found = solve_held_out(halves(R, T), kinds)
    assert best < 0.97 * shared
    assert found.held_out < 0.98 * shared
    assert found.held_out < (1.001 + TOLERANCE) * best + ROUNDING * np.square(T).sum()
    assert len(found.ridges.unique()) == 2
    assert (found.ridges[:6] == found.ridges[0]).all()
    assert (found.ridges[6:] == found.ridges[6]).all()


@pytest.mark.parametrize(("kinds", "groups"), [(None, None), ([6, 50], None), ([6, 20, 30], [6, 50])], ids=str)
def test_solution_and_errors_are_those_of_ridges_on_the_rows(kinds, groups):
    R, T, _ = two_kinds()
    scale = scale_of_kinds(R, kinds or [56])
    found = solve_held_out(halves(R, T), kinds, groups)
    ridges = found.ridges.numpy()
    np.testing.assert_allclose(found.solution.numpy(), direct_ridge(R, T, ridges, scale), rtol=1e-7, atol=1e-9)
    assert (found.fitted, found.held_out) == pytest.approx(errors_of(R, T, ridges, scale), rel=1e-8)
    assert found.fitted < found.held_out
    assert len({*ridges.tolist()}) <= len(groups or kinds or [56])


def test_column_without_any_power_gets_nothing_and_changes_nothing():
    R, T = problem(rows=100, columns=6, targets=3, noise=1)
    found = solve_held_out(halves(np.insert(R, 2, 0.0, axis=1), T)).solution.numpy()
    assert not found[2].any()
    np.testing.assert_allclose(np.delete(found, 2, axis=0), solve_held_out(halves(R, T)).solution.numpy(), rtol=1e-9)


def test_columns_that_are_equal_share_a_solution():
    """Their sums of products are singular."""
    R, T = problem(rows=100, columns=3, targets=2, noise=1)
    found = solve_held_out(halves(np.hstack([R, R]), T)).solution
    torch.testing.assert_close(found[:3], found[3:], rtol=1e-6, atol=1e-9)


def test_equations_of_some_regressors_and_of_both_halves_are_those_of_the_rows():
    R, T = problem(rows=60, columns=5, targets=3, noise=1)
    first, second = halves(R, T)
    some, V = [0, 2, 3], np.ones((3, 3))
    both = (first + second).select(torch.tensor(some))
    assert both.error(torch.from_numpy(V)) == pytest.approx(np.square(T - R[:, some] @ V).sum(), rel=1e-9)


@pytest.mark.parametrize("width", [3, 8, 200])
def test_a_sketch_keeps_inner_products_on_average_and_all_of_few_directions(width):
    found = sketch(width, 8).double()
    assert found.shape == (width, min(width, 8))
    assert torch.equal(found, sketch(width, 8).double())
    torch.testing.assert_close(
        found.mT @ found, width / found.shape[1] * torch.eye(found.shape[1]).double(), rtol=0, atol=1e-5
    )
    if width <= 8:
        assert torch.equal(found, torch.eye(width).double())
