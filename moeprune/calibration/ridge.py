"""Ridge regression from running sums, with a strength for each kind of regressors chosen by held-out error.

Solves min over V of  E |T - R·V|² + sum over kinds of lambda_kind·|V_kind|², on columns of R that are scaled to unit
power (those weaker than WEAKEST times the strongest one of their kind as if they had that: their coefficients would
be huge, and all noise). The lambdas are found by descent, a decade at a time: first one for all kinds, then each by
itself. Then all are made stronger together while the held-out error stays within TOLERANCE: that makes coefficients
several times smaller, which narrow floats need. lambda → infinity leaves V = 0.

Axes: q regressors, o targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Exponents = tuple[int, ...]
EXPONENTS = (-6, 2)  # of ten, for the least and the largest lambda
START = -3
ROUNDS = 3
LARGE = 1500  # regressors from which lambdas are searched in float32, in one round, from LEAST_IN_FLOAT32 on
LEAST_IN_FLOAT32 = -4
WEAKEST = 0.01
TOLERANCE = 0.01  # of the error that is left, or of what is gained if that is less
ROUNDING = 1e-5  # of the targets' squares: errors that narrow floats make anyway
TARGETS = 64  # random mixtures of the targets by which lambdas are chosen, if there are more


class Equations(NamedTuple):
    """The normal equations of a least-squares problem: sums over the rows of R (…,q) and T (…,o)."""

    power: Tensor  # RᵀR (q,q)
    cross: Tensor  # RᵀT (q,o)
    square: float  # |T|²

    def __add__(self, more: Equations) -> Equations:  # type: ignore[override]
        return Equations(self.power + more.power, self.cross + more.cross, self.square + more.square)

    def scaled(self, scale: Tensor) -> Equations:
        """Return the equations with each column of R divided by its scale (q)."""
        return Equations((self.power / scale[:, None]).div_(scale), self.cross / scale[:, None], self.square)

    def select(self, index: Tensor | slice) -> Equations:
        """Return the equations of some of the regressors."""
        return Equations(self.power[index][:, index], self.cross[index], self.square)

    def error(self, solution: Tensor) -> float:
        """Return |T - R·V|² for V (q,o)."""
        return self.square - float((solution * (2 * self.cross - self.power @ solution)).sum())


Halves = tuple[Equations, Equations]


class Fit(NamedTuple):
    """A regression on two halves of the data together.

    fitted, held_out: squared errors of regressions on one half, on that half and on the other, both ways. ridges: the
    lambda of each column (q); None if the best is to leave V = 0.
    """

    solution: Tensor  # V (q,o)
    fitted: float
    held_out: float
    ridges: Tensor | None


def column_scale(squares: Tensor, kinds: Sequence[int]) -> Tensor:
    """Return what to divide each column of R by (q), from the diagonal of RᵀR (q) and the number of each kind."""
    parts = squares.clamp_min(0).sqrt().split(list(kinds))
    tiny = torch.finfo(squares.dtype).tiny ** 0.25  # whose square a column without any power is divided by
    return torch.cat([part.clamp_min(max(WEAKEST * float(part.max()), tiny)) if len(part) else part for part in parts])


def solve_held_out(
    halves: Halves,
    kinds: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    reported: Halves | None = None,
) -> Fit:
    """Fit a ridge regression on two halves of the data together, with lambdas chosen by `choose_ridges`.

    Args:
        halves: on the CPU in float64, like the result.
        kinds: how many columns of R are of each kind, in their order, for their scale; None: all of one.
        groups: likewise, of those that share a lambda; None: the kinds.
        reported: equations with other targets, of which the errors in the result are; None: of the same.
    """
    squares = halves[0].power.diagonal() + halves[1].power.diagonal()
    scale = column_scale(squares, kinds or [len(squares)])
    first, second = (half.scaled(scale) for half in halves)
    ridges = choose_ridges((first, second), groups or kinds or [len(squares)])
    judges = [first, second]
    if reported is not None:
        others = zip(judges, reported, strict=True)
        judges = [half._replace(cross=of.cross / scale[:, None], square=of.square) for half, of in others]
    if ridges is None:
        square = judges[0].square + judges[1].square
        return Fit(torch.zeros_like(first.cross), square, square, None)
    one, other = (solve(half, ridges / 2) for half in (first, second))
    fitted = judges[0].error(one) + judges[1].error(other)
    held_out = judges[0].error(other) + judges[1].error(one)
    return Fit(solve(first + second, ridges) / scale[:, None], fitted, held_out, ridges)


def solve(equations: Equations, ridges: Tensor) -> Tensor:
    """Return V (q,o) of the ridge regression with a lambda for each column (q)."""
    return torch.cholesky_solve(equations.cross, factorized(equations.power, ridges))


def factorized(power: Tensor, ridges: Tensor) -> Tensor:
    """Return the Cholesky factor (q,q) of RᵀR with a lambda added for each column (q).

    Rounding can make sums of products indefinite; the ridge is then made as much stronger as it takes.
    """
    for stronger in range(6):
        matrix = power.clone()
        matrix.diagonal().add_(ridges.clamp_min(1e-12) * 10**stronger)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            break
    return factor


def choose_ridges(halves: Halves, groups: Sequence[int]) -> Tensor | None:
    """Return the lambda of each column (q) for the sum of two scaled halves; None where every one does harm.

    groups: how many columns, in their order, share a lambda.
    """
    sizes, (first, second) = torch.tensor(list(groups)), halves
    square = first.square + second.square
    is_large = len(first.power) > LARGE
    dtype = torch.float32 if is_large else first.power.dtype
    one, other = (
        half._replace(power=half.power.to(dtype), cross=_mixed(half.cross).to(dtype)) for half in (first, second)
    )
    least = LEAST_IN_FLOAT32 if is_large else EXPONENTS[0]
    known: dict[Exponents, float] = {}

    def ridges(exponents: Exponents) -> Tensor:
        return 10.0 ** torch.tensor(exponents, dtype=torch.float64).repeat_interleave(sizes)

    def gain(exponents: Exponents) -> float:
        if exponents not in known:
            known[exponents] = _gain((one, other), ridges(exponents).to(dtype))
        return known[exponents]

    together = range(len(sizes))
    best = _climb(gain, (START,) * len(sizes), together, least)
    for _ in range(1 if is_large else ROUNDS):
        before = best
        for kind in together:
            best = _climb(gain, best, (kind,), least)
        if best == before:
            break
    found = _gain(halves, ridges(best))
    if not found > 0:
        return None
    enough = gain(best) - TOLERANCE * min(max(square - found, 0), found) - ROUNDING * square
    while (stronger := _moved(best, together, 1)) != best and gain(stronger) >= enough:
        best = stronger
    return ridges(best)


def _gain(halves: Halves, ridges: Tensor) -> float:
    """Return by how much the error on the inputs not fitted is less than that of V = 0, both ways."""
    first, second = halves
    one, other = (solve(half, ridges / 2) for half in halves)
    return first.square + second.square - second.error(one) - first.error(other)


def _climb(gain: Callable[[Exponents], float], start: Exponents, moving: Sequence[int], least: int) -> Exponents:
    """Return the exponents, none below the least, with the largest gain found by moving some of them together."""
    best = start
    for step in (1, -1):
        while (other := _moved(best, moving, step, least)) != best and gain(other) > gain(best):
            best = other
        if best != start:
            break
    return best


def _moved(exponents: Exponents, moving: Sequence[int], step: int, least: int = EXPONENTS[0]) -> Exponents:
    """Return the exponents with some of them a step further, between the least and the largest of EXPONENTS."""
    most = EXPONENTS[1]
    return tuple(min(max(each + step, least), most) if kind in moving else each for kind, each in enumerate(exponents))


def _mixed(cross: Tensor) -> Tensor:
    """Return random orthonormal mixtures of the targets, TARGETS at most."""
    targets = cross.shape[1]
    if targets <= TARGETS:
        return cross
    return cross @ sketch(targets, TARGETS).to(cross)


def sketch(width: int, directions: int) -> Tensor:
    """Return a fixed random matrix S (o,s) with E[SSᵀ] = 1 and orthogonal columns; the identity if s ≥ o."""
    if directions >= width:
        return torch.eye(width)
    generator = torch.Generator().manual_seed(width)
    columns = torch.linalg.qr(torch.randn(width, directions, generator=generator, dtype=torch.float64))[0]
    return (columns * (width / directions) ** 0.5).float()
