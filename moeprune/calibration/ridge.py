"""Ridge regression from running sums, its strength chosen by held-out error.

Solves min over V of  E |T - R·V|² + lambda·|V|², on columns of R that are scaled to unit power (those
weaker than WEAKEST times the strongest one of their kind as if they had that: their coefficients would be
huge, and all noise). Of the lambdas whose error on held-out inputs is least, up to GAIN_KEPT of what there
is to gain, the strongest is taken: that makes coefficients several times smaller, which narrow floats need.
lambda → infinity leaves V = 0.

Axes: q regressors, o targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAMBDAS = [10.0**exponent for exponent in range(-6, 3)]
WEAKEST = 0.01
GAIN_KEPT = 0.99


class Equations(NamedTuple):
    """The normal equations of a least-squares problem: sums over the rows of R (…,q) and T (…,o)."""

    power: Tensor  # RᵀR (q,q)
    cross: Tensor  # RᵀT (q,o)

    def scaled(self, scale: Tensor) -> Equations:
        """Return the equations with each column of R divided by its scale (q)."""
        return Equations(self.power / (scale[:, None] * scale), self.cross / scale[:, None])


def column_scale(power: Tensor, kinds: Sequence[int]) -> Tensor:
    """Return what to divide each column of R by (q), from RᵀR (q,q) and the number of each kind."""
    parts = power.diagonal().sqrt().split(list(kinds))
    tiny = torch.finfo(power.dtype).tiny ** 0.25  # whose square a column without any power is divided by
    return torch.cat([part.clamp_min(max(WEAKEST * float(part.max()), tiny)) for part in parts])


def solve_held_out(first: Equations, second: Equations, kinds: Sequence[int] | None = None) -> Tensor:
    """Return V (q,o) of the ridge regression on two halves of the data together.

    lambda is chosen by fitting one half and measuring the error on the other, both ways.

    Args:
        first, second: the halves, on the CPU in float64, like the result.
        kinds: how many columns of R are of each kind, in their order; None: all of one.
    """
    both = Equations(first.power + second.power, first.cross + second.cross)
    scale = column_scale(both.power, kinds or [len(both.power)])
    ridge = choose_ridge(first.scaled(scale), second.scaled(scale))
    if ridge is None:
        return torch.zeros_like(both.cross)
    power, cross = both.scaled(scale)
    identity = torch.eye(len(power), dtype=power.dtype)
    return torch.linalg.solve(power + ridge * identity, cross) / scale[:, None]


def choose_ridge(first: Equations, second: Equations) -> float | None:
    """Return lambda for the sum of two scaled halves; None where every one does harm."""
    gains = torch.zeros(len(LAMBDAS), dtype=torch.float64)  # over V = 0, on the inputs not fitted
    for fitted, held_out in ((first, second), (second, first)):
        values, vectors = torch.linalg.eigh(fitted.power)
        rotated, rotated_cross = vectors.mT @ held_out.power @ vectors, vectors.mT @ held_out.cross
        for index, ridge in enumerate(LAMBDAS):
            solution = (vectors.mT @ fitted.cross) / (values.clamp_min(0) + ridge / 2)[:, None]
            gains[index] += (solution * (2 * rotated_cross - rotated @ solution)).sum()
    best = float(gains.max())
    if not best > 0:
        return None
    return LAMBDAS[int((gains >= GAIN_KEPT * best).nonzero().max())]
