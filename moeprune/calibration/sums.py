"""Sums over calibration inputs of what each expert of a dense layer adds, and of what is lost of it.

Expert j adds R_j (m,o). When it is dropped, its constants w_j·mu_j take its place, and, where a regression is
fitted, Z·V_j with the regressors Z (m,q): the weights of all terms (`lstsq`), and beside them the layer's
input, the mean of its tokens and 1 (`affine`). The sums over inputs

    power ZᵀZ (q,q)      cross ZᵀR_j (n+1,q,o)      gram <R_j, R_l> (n+1,n+1)

are all that such regressions take, for every set of experts: a set adds the sum of what its experts add. The
last of n + 1 is the gap: what is missing whatever is dropped, such as what pruned layers before it broke.

Axes: b inputs, m tokens, d width of the input, o width of the output, n experts, p terms per expert, q
regressors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.calibration.ridge import Equations, choose_ridge, column_scale
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation
from moeprune.plan import AFFINE

CHUNK = 2**24  # numbers at most in each of the tensors that the lost parts of some outputs need


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest float that sums over a data set can be kept in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def half_of(first: int, count: int) -> Tensor:
    """Return in which half, 0 or 1, the inputs first, first + 1, … are (count), by hash of their number."""
    mixed = torch.arange(first, first + count)
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        mixed = ((mixed ^ (mixed >> 16)) * multiplier) % 2**32
    return (mixed >> 16) & 1


def halves(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the places, from 0 on, of those of the inputs first, first + 1, … that are in either half."""
    half = half_of(first, count)
    return (half == 0).nonzero().flatten(), (half == 1).nonzero().flatten()


def sums_in_bytes(layer: MoELayer, compensation: str) -> int:
    """Return the bytes that both halves of a layer's sums take."""
    n, _, out = layer.term_shape
    q = sum(layer.regressor_kinds(compensation))
    return 2 * (8 * q * q + 4 * (n + 1) * q * out)


class Contributions:
    """The sums of one layer over some inputs."""

    def __init__(self, layer: MoELayer, compensation: str):
        n, _, out = layer.term_shape
        device = layer.fc2_weight.device
        self.compensation = compensation
        self.kinds = layer.regressor_kinds(compensation)
        q, dtype = sum(self.kinds), wide_dtype(device)
        self.power = torch.zeros(q, q, device=device, dtype=dtype)
        self.cross = torch.zeros(n + 1, q, out, device=device)
        self.gram = torch.zeros(n + 1, n + 1, device=device, dtype=dtype)

    def add(self, observation: Observation, gap: Tensor | None = None) -> None:
        """Add inputs: what the dense layer computed, and the gap (b,m,o) that is missing in any case."""
        if len(observation.mass) == 0:
            return
        n = len(self.cross) - 1
        z = observation.regressors(self.compensation)
        rows = z.flatten(0, 1)
        wide = rows.to(self.power)
        self.power += wide.mT @ wide
        observation.add_cross(z, self.cross[:n])
        self.gram[:n, :n] += observation.gram(self.gram.dtype)
        if gap is not None:
            gap = gap.float()
            self.cross[n] += rows.mT @ gap.flatten(0, 1)
            with_gap = observation.products(gap, self.gram.dtype)
            self.gram[:n, n] += with_gap
            self.gram[n, :n] += with_gap
            self.gram[n, n] += gap.square().sum(dtype=self.gram.dtype)

    def equations(self, dropped: Sequence[int], term_mean: Tensor) -> Equations:
        """Return the equations, on the CPU in float64, of the regression on the gap and what dropped experts
        add beside their means mu (n,p,o).
        """
        index = torch.tensor(dropped, dtype=torch.int64, device=self.cross.device)
        n, p, out = term_mean.shape
        cross = (self.cross[n] + self.cross[index].sum(0)).to("cpu", torch.float64)
        power = self.power.to("cpu", torch.float64)
        means = torch.zeros(n, p, out, dtype=torch.float64)
        means[list(dropped)] = term_mean[list(dropped)].double()
        return Equations(power, cross - power[:, : n * p] @ means.flatten(0, 1))


Halves = tuple[Contributions, Contributions]


def lost_gram(first: Contributions, second: Contributions, term_mean: Tensor, compensation: str) -> Tensor:
    """Return the Gram matrix (n+1,n+1) of what is lost of each expert's contribution under a compensation.

    Args:
        first, second: two halves of the inputs.
        term_mean: mu (n,p,o).
        compensation: `mean` or a fitted one, for which the regression is fitted to one half and its error
            is measured on the other, both ways; `refit` is taken for `affine`.

    Returns:
        The sum over the inputs of both, in float64 on the CPU, the gap last; NaN where sums are not finite.
    """
    n, p, out = term_mean.shape
    kinds = first.kinds if compensation in AFFINE else first.kinds[:1]
    q = sum(kinds)
    powers = [half.power[:q, :q].to("cpu", torch.float64) for half in (first, second)]
    grams = [half.gram.to("cpu", torch.float64) for half in (first, second)]
    if not all(part.isfinite().all() for part in powers + grams):
        return torch.full((n + 1, n + 1), torch.nan, dtype=torch.float64)
    scale, scaled, factors = torch.ones(q, dtype=torch.float64), powers, []
    if compensation != "mean":
        scale = column_scale(powers[0] + powers[1], kinds)
        crosses = [half.equations(range(n), term_mean).cross[:q] for half in (first, second)]
        equations = [Equations(*pair).scaled(scale) for pair in zip(powers, crosses, strict=True)]
        scaled, ridge = [half.power for half in equations], choose_ridge(*equations)
        if ridge is not None:
            identity = torch.eye(q, dtype=torch.float64)
            factors = [torch.linalg.cholesky(power + ridge / 2 * identity) for power in scaled]
    lost = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    step = max(1, CHUNK // ((n + 1) * q))
    for start in range(0, out, step):
        means = term_mean[:, :, start : start + step].double()
        crosses = []
        for power, half in zip(powers, (first, second), strict=True):
            own = half.cross[:, :q, start : start + step].to("cpu", torch.float64)
            lost -= _with_means(power, own, means)
            own[:n] -= torch.einsum("qjp,jpo->jqo", power[:, : n * p].unflatten(1, (n, p)), means)
            crosses.append(own.div_(scale[:, None]))
        for factor, fitted, measured, power in zip(factors, crosses, crosses[::-1], scaled[::-1], strict=False):
            columns = fitted.transpose(0, 1).flatten(1)  # (q,(n+1)·o)
            fit = torch.cholesky_solve(columns, factor).unflatten(1, (n + 1, -1)).transpose(0, 1)
            of_both = torch.einsum("jqo,lqo->jl", measured, fit)
            lost += torch.einsum("jqo,lqo->jl", fit, power @ fit) - of_both - of_both.mT
    return lost + grams[0] + grams[1]


def _with_means(power: Tensor, cross: Tensor, means: Tensor) -> Tensor:
    """Return what subtracting C_j·mu_j from each expert's contribution takes off the Gram matrix (n+1,n+1).

    power: (q,q). cross: (n+1,q,o). means: mu (n,p,o).
    """
    n, p, _ = means.shape
    taken = torch.zeros(n + 1, n + 1, dtype=power.dtype)
    of_means = torch.einsum("jlpo,lpo->jl", cross[:, : n * p].unflatten(1, (n, p)), means)  # <R_j, C_l·mu_l>
    taken[:, :n] += of_means
    taken[:n] += of_means.mT
    overlap = power[: n * p, : n * p].view(n, p, n, p)
    taken[:n, :n] -= torch.einsum("jplq,jpo,lqo->jl", overlap, means, means)
    return taken
