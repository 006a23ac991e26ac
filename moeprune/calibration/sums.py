"""Sums over calibration inputs: of a regression, and of what is lost with each expert of a dense layer.

Without expert j its constants w_j·mu_j take its place, so that R_j - w_j·mu_j is lost (m,o), and where a regression
is fitted, Z·V_j less: with the regressors Z (m,q), the weights of all terms (`lstsq`), and beside them the layer's
input, the mean of its tokens and 1 (`affine`). For choosing experts

    power ZᵀZ (q,q)      cross ZᵀE_j (n+1,q,s)      gram <E_j, E_l> (n+1,n+1)      E_j = (R_j - w_j·mu_j)·S

are all that such regressions take, for every set of experts: a set loses the sum of what its experts lose. The last
of n + 1 is the gap: what is missing whatever is dropped, such as what pruned layers before it broke. S (o,s) projects
outputs on a few fixed random directions, which keeps inner products on average; from TERMS on, weights are mixed too.

Products of weights are in float64 where the device has it, others in float32, as is the sum `cross`; all other sums are
wide.

Axes: b inputs, m tokens, d width of the input, o width of the output, n experts, p terms per expert, q regressors,
s directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.calibration.ridge import Equations, choose_ridges, column_scale, factorized, sketch, solve_held_out
from moeprune.layers.layer import MoELayer
from moeprune.layers.observation import Observation, mean_token

CHUNK = 2**24  # numbers at most in each of the temporary tensors
TERMS = 512  # weights that choosing regresses on, at most: mixtures of them, if there are more
DIRECTIONS = 32  # of the output, that choosing looks at, at most
CROSS = 2**27  # bytes of the sums of a half, beyond which fewer directions are looked at
LEAST_DIRECTIONS = 8


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


@dataclass(frozen=True)
class Columns:
    """The regressors of some inputs, by how they vary: of each token, and of each input (or window) alone."""

    of_tokens: Tensor  # (b,m,q): weights first
    weights: int  # how many of these are weights
    of_inputs: Tensor  # (b,r): the mean token, if it is used, and 1
    count: Tensor  # tokens that are not padding (b,1)


def columns(seen: Observation, kinds: Mapping[str, int], mixing: Tensor | None = None) -> Columns:
    """Return the regressors of these kinds, `hidden` excepted: see `MoELayer.regressor_kinds`.

    mixing: of the weights (n·p,t); None: they stay as they are.
    """
    tokens, mask = seen.tokens.float(), seen.mask
    ones = tokens[:, :, :1].new_ones(()).expand(*tokens.shape[:2], 1) if mask is None else mask[:, :, None].float()
    of_tokens, of_inputs, weights = [], [], 0
    if "terms" in kinds:
        of_tokens.append(seen.term_weights() if mixing is None else seen.term_weights() @ mixing)
        weights = of_tokens[0].shape[2]
    if "bias" in kinds:
        of_tokens.append(seen.weights.float().sum(3))
        weights += of_tokens[-1].shape[2]
    if "token" in kinds:
        of_tokens.append(tokens)
        of_inputs = [mean_token(tokens, mask)] if "mean" in kinds else []
        of_inputs.append(torch.ones_like(tokens[:, 0, :1]))
    joined = torch.cat(of_tokens, 2) if of_tokens else tokens[:, :, :0]
    per_input = torch.cat(of_inputs, 1) if of_inputs else tokens[:, 0, :0]
    return Columns(joined, weights, per_input, ones.sum(1))


class RegressionSums:
    """Sums for the regressions of some targets on columns of some kinds, over some inputs.

    power: the products of these columns with each other (q,q), if they are known.
    """

    def __init__(
        self, kinds: Mapping[str, int], width: int, device: torch.device, power: Tensor | None = None, targets: int = 1
    ):
        q, dtype = sum(kinds.values()), wide_dtype(device)
        self.kinds, self.knows_power = kinds, power is not None
        self.power = torch.zeros(q, q, device=device, dtype=dtype) if power is None else power
        self.cross = torch.zeros(targets, q, width, device=device, dtype=dtype)
        self.square = torch.zeros(targets, device=device, dtype=dtype)

    def add(self, seen: Observation, *targets: Tensor) -> None:
        """Add what a layer shows on some inputs, and what is wanted there (b,m,o)."""
        if len(seen.mass) == 0:
            return
        found, start = columns(seen, self.kinds), self.kinds.get("hidden", 0)
        wanted = [target.float().reshape(*seen.tokens.shape[:2], -1) for target in targets]
        if not self.knows_power:
            add_products(found, self.power[start:, start:])
        for target, cross, square in zip(wanted, self.cross, self.square, strict=True):
            add_targets(found, target, cross[start:], square)
        if start:
            self._add_hidden(seen, found, wanted, start)

    def _add_hidden(self, seen: Observation, found: Columns, targets: list[Tensor], size: int) -> None:
        """Add the products of what the kept experts' last linears take, weighted, summed over terms."""
        q, others = found.of_tokens.shape[2], torch.cat([found.of_tokens, *targets], 2)
        with_others, with_inputs = seen.hidden_products(others, found.of_inputs, self.power[:size, :size])
        self.cross[:, :size] += with_others[:, q:].unflatten(1, (len(targets), -1)).transpose(0, 1)
        across = torch.cat([with_others[:, :q], with_inputs], 1)
        self.power[:size, size:] += across
        self.power[size:, :size] += across.mT

    def equations(self) -> list[Equations]:
        """Return the equations of each target, on the CPU in float64."""
        power, cross = (part.to("cpu", torch.float64) for part in (self.power, self.cross))
        power.copy_((power + power.mT).div_(2))  # rounding need not be symmetric
        return [Equations(power, *each) for each in zip(cross, self.square.tolist(), strict=True)]


def add_products(found: Columns, power: Tensor, with_weights: Tensor | None = None) -> None:
    """Add the products of all columns with each other to `power` (q,q).

    with_weights: those of all that are of tokens with weights, if they are known.
    """
    q, w, dtype = found.of_tokens.shape[2], found.weights, power.dtype
    others = found.of_tokens[:, :, w:]
    if w:
        if with_weights is None:
            wide = found.of_tokens.to(dtype)
            with_weights = _inner(wide, wide[:, :, :w])
        power[:q, :w] += with_weights
        power[:w, w:q] += with_weights[w:].mT
    power[w:q, w:q] += _inner(others, others)
    inputs = found.of_inputs.to(dtype)
    with_inputs = found.of_tokens.sum(1).to(dtype).mT @ inputs
    power[:q, q:] += with_inputs
    power[q:, :q] += with_inputs.mT
    power[q:, q:] += (inputs * found.count).mT @ inputs


def add_targets(found: Columns, targets: Tensor, cross: Tensor, square: Tensor) -> None:
    """Add the products of all columns with targets (b,m,o) to `cross` (q,o), and their squares to `square`."""
    q, w, dtype = found.of_tokens.shape[2], found.weights, cross.dtype
    weights, others = found.of_tokens.split([w, q - w], 2)
    cross[:w] += _inner(weights.to(dtype), targets.to(dtype))
    cross[w:q] += _inner(others, targets)
    cross[q:] += found.of_inputs.mT.to(dtype) @ targets.sum(1, dtype=dtype)
    square += targets.square().sum(dtype=square.dtype)


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum over inputs and tokens of oneᵀ·other for (b,m,q) and (b,m,r)."""
    return one.flatten(0, 1).mT @ other.flatten(0, 1)


class Contributions:
    """Sums for choosing among the experts of a dense layer, over some inputs.

    term_mean: mu (n,p,o).
    """

    def __init__(self, layer: MoELayer, term_mean: Tensor):
        n, p, out = layer.term_shape
        device, dim = layer.fc2_weight.device, layer.config.dim
        self.mean = term_mean.to(device, torch.float32)
        self.mixing = sketch(n * p, TERMS).to(device) if n * p > TERMS else None
        of_mean = {"mean": dim} if layer.config.uses_mean_token else {}
        self.kinds = {"terms": min(n * p, TERMS), "token": dim, **of_mean, "one": 1}
        q, dtype = sum(self.kinds.values()), wide_dtype(device)
        directions = min(DIRECTIONS, max(LEAST_DIRECTIONS, CROSS // (4 * (n + 1) * q)))
        self.directions = sketch(out, directions).to(device)
        self.power = torch.zeros(q, q, device=device, dtype=dtype)
        self.cross = torch.zeros(n + 1, q, self.directions.shape[1], device=device)
        self.gram = torch.zeros(n + 1, n + 1, device=device, dtype=dtype)
        self.output_cross = torch.zeros(q, self.directions.shape[1], device=device, dtype=dtype)  # with all of Y·S
        self.output_square = torch.zeros((), device=device, dtype=dtype)

    def add(self, seen: Observation, gap: Tensor | None = None) -> None:
        """Add inputs: what the dense layer computed, and the gap (b,m,o) that is missing in any case."""
        if len(seen.mass) == 0:
            return
        n = len(self.cross) - 1
        found = columns(seen, self.kinds, self.mixing)
        lost = seen.lost(self.mean, self.directions)
        with_weights = seen.add_cross(found.of_tokens, found.of_inputs, lost, self.cross[:n], self.power.dtype)
        with_weights = with_weights if self.mixing is None else with_weights @ self.mixing.to(with_weights)
        add_products(found, self.power, with_weights)
        add_targets(found, seen.output.float() @ self.directions, self.output_cross, self.output_square)
        self.gram[:n, :n] += seen.gram(self.gram.dtype, lost)
        if gap is not None:
            gap = gap.float().reshape(*seen.tokens.shape[:2], -1) @ self.directions
            add_targets(found, gap, self.cross[n], self.gram[n, n])
            with_gap = seen.products(gap, lost, self.gram.dtype)
            self.gram[:n, n] += with_gap
            self.gram[n, :n] += with_gap

    def of_output(self) -> Equations:
        """Return the equations for the layer's output in the directions, on the CPU in float64."""
        power, cross = (part.to("cpu", torch.float64) for part in (self.power, self.output_cross))
        return Equations(power, cross, float(self.output_square))


Halves = tuple[Contributions, Contributions]


def lost_gram(first: Contributions, second: Contributions, compensation: str) -> Tensor:
    """Return the Gram matrix (n+1,n+1) of what is lost of each expert's contribution under a compensation.

    compensation: `mean`, `lstsq`, or `affine`; the regression is fitted to one half of the inputs and its error is
    measured on the other, both ways. Returns the sum over the inputs of both, in float64 on the CPU, the gap last; NaN
    where sums are not finite.
    """
    gram = (first.gram + second.gram).to("cpu", torch.float64)
    if compensation == "mean" or not gram.isfinite().all():
        return gram
    sizes = [*first.kinds.values()]
    sizes, groups = (sizes, [sizes[0], sum(sizes[1:])]) if compensation == "affine" else (sizes[:1], sizes[:1])
    q = sum(sizes)
    powers = [half.power[:q, :q].to("cpu", torch.float64) for half in (first, second)]
    scale = column_scale(powers[0].diagonal() + powers[1].diagonal(), sizes)
    crosses = [half.cross[:, :q].to("cpu", torch.float64).div_(scale[:, None]) for half in (first, second)]
    scaled = [(power / scale[:, None]).div_(scale) for power in powers]
    if not all(part.isfinite().all() for part in scaled + crosses):
        return torch.full_like(gram, torch.nan)
    one, other = (
        Equations(power, cross.sum(0), float(half.gram.sum()))
        for power, cross, half in zip(scaled, crosses, (first, second), strict=True)
    )
    ridges = choose_ridges((one, other), groups)
    if ridges is None:
        return gram
    return gram + sum(_change(scaled[i], crosses[i], scaled[1 - i], crosses[1 - i], ridges) for i in (0, 1))


def explained(first: Contributions, second: Contributions) -> Tensor:
    """Return the shares of the output's variance over tokens, on inputs that were not fitted, that are explained by a
    linear map of the layer's input and its mean token; by the router with a constant for each term; and by both (3).
    """
    (n_terms, *of_tokens), q = first.kinds.values(), len(first.power)
    one, other = (half.of_output() for half in (first, second))
    if not all(part.isfinite().all() for half in (one, other) for part in half[:2]):
        return torch.full((3,), torch.nan)
    terms, last = torch.arange(n_terms), torch.tensor([q - 1])
    left = []
    for index, kinds in (
        (last, [1]),
        (torch.arange(n_terms, q), of_tokens),
        (torch.cat([terms, last]), [n_terms, 1]),
        (torch.arange(q), [n_terms, *of_tokens]),
    ):
        left.append(solve_held_out((one.select(index), other.select(index)), kinds, [len(index)]).held_out)
    variance = max(left[0], torch.finfo(torch.float64).tiny)
    return torch.tensor([1 - min(max(each / variance, 0.0), 1.0) for each in left[1:]])


def _change(power: Tensor, cross: Tensor, held_power: Tensor, held_cross: Tensor, ridges: Tensor) -> Tensor:
    """Return by how much fits to one half change the Gram matrix (n+1,n+1) of what is lost on the other."""
    inverse = torch.cholesky_inverse(factorized(power, ridges / 2))  # of so many targets quicker than solving
    change = torch.zeros(len(cross), len(cross), dtype=cross.dtype)
    step = max(1, CHUNK // cross[:, :, 0].numel())
    for parts in zip(cross.split(step, 2), held_cross.split(step, 2), strict=True):
        fitted, measured = (part.transpose(0, 1).flatten(1) for part in parts)  # (q,(n+1)·s)
        fit = inverse @ fitted
        rest = torch.sub(held_power @ fit, measured, alpha=2)
        fit, rest = (part.float().unflatten(1, (len(cross), -1)).transpose(0, 1).flatten(1) for part in (fit, rest))
        change += fit @ rest.mT  # the largest product, of (n+1,q·s)
    return (change + change.mT) / 2
