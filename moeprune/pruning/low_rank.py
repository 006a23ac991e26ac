"""Low-rank maps in place of dropped experts, by reduced-rank regression.

Each dropped expert j becomes f(s) ≈ (s - mean s)·A·B + mean f, of rank r, which minimises the squared error of its own
outputs over its inputs s, each times the sum over tokens of its squared weights: its error in the layer's output.
The ridge solution X of f on s is projected on the r leading eigenvectors V of Xᵀ·Cov(s)·X (Izenman 1975): A = X·V,
B = Vᵀ. One ridge, in units of the mean variance of s, serves all experts; it is chosen by the error on held-out inputs.

Axes: e experts, p terms per expert, d width of the input, o of the output, r rank.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.sums import wide_dtype
from moeprune.calibration.walk import Stage
from moeprune.layers.layer import MoELayer
from moeprune.plan import LayerPlan

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD = 512 << 20  # bytes of moments at once
CHOOSING = 8  # experts, spread evenly, by which the ridge is chosen
ITERATIONS = 8  # of the search for leading eigenvectors
SPARE = 8  # directions beyond the rank that it follows


class Moments(NamedTuple):
    """Weighted sums over the inputs of some experts."""

    weight: Tensor  # (e)
    inputs: Tensor  # of s (e,d)
    outputs: Tensor  # of f (e,o)
    power: Tensor  # of s·sᵀ (e,d,d)
    cross: Tensor  # of s·fᵀ (e,d,o)
    square: Tensor  # of |f|² (e)

    def __add__(self, more: "Moments") -> "Moments":  # type: ignore[override]
        return Moments(*(one + other for one, other in zip(self, more, strict=True)))

    def select(self, experts: Sequence[int] | Tensor) -> "Moments":
        """Return those of some of the experts."""
        return Moments(*(part[experts] for part in self))

    def centred(self) -> "Moments":
        """Return the sums of inputs and outputs without their means, which `inputs` and `outputs` then are."""
        weight = self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        inputs, outputs = self.inputs / weight[:, None], self.outputs / weight[:, None]
        scaled = inputs * weight[:, None]
        return Moments(
            weight, inputs, outputs,
            self.power - scaled[:, :, None] * inputs[:, None],
            self.cross - scaled[:, :, None] * outputs[:, None],
            self.square - weight * outputs.square().sum(1),
        )  # fmt: skip


def fit_low_rank(stage: Stage, layer: MoELayer) -> float:
    """Fit the low-rank maps of a pruned layer, and the constants of their experts, in place.

    Returns by how much the squared error of maps fitted to one half is larger on the other half, summed over experts.
    """
    plan = layer.plan
    assert plan is not None
    assert plan.rank is not None
    experts = _mapped(plan)
    gap, like, first = 0.0, layer.surrogate, len(layer.surrogate) - len(experts)
    known = stage.shared.setdefault(("maps", *experts), {})
    for start, count, halves, around in _moments_of(stage, experts):
        ridge, more = choose_ridge(halves, plan.rank, known.setdefault(start, {}))
        gap += more
        for some in torch.arange(count).split(CHOOSING):
            moments = (halves[0].select(some) + halves[1].select(some)).centred()
            into, out_of = _shared(known, (start + int(some[0]), ridge), moments, ridge, plan.rank)
            inputs, outputs = around[0][some] + moments.inputs, around[1][some] + moments.outputs
            places = start + some
            layer.low_rank_in[places] = into.to(like)
            layer.low_rank_out[places] = out_of.to(like)
            like[first + places] = (outputs - (inputs[:, None] @ into @ out_of)[:, 0])[:, None].to(like)
    return gap


def _mapped(plan: LayerPlan) -> list[int]:
    """Return the experts that have a map: with routed scopes, all."""
    return list(plan.dropped) if plan.scope == "static" else list(range(plan.num_experts))


def rank_of_energy(stage: Stage, plan: LayerPlan) -> int:
    """Return the least rank, up to half an expert's width, whose maps hold a plan's share of the energy that maps of
    full rank have: of the squares of their outputs around the mean, summed over the dropped experts.
    """
    assert plan.energy is not None
    config = stage.layer.config
    most = max(1, min(config.dim, config.output_width, config.expert_width // 2))
    energies = torch.zeros(config.output_width, dtype=torch.float64)
    for _, count, halves, _ in _moments_of(stage, _mapped(plan)):
        ridge, _ = choose_ridge(halves, most, {})
        for some in torch.arange(count).split(CHOOSING):
            moments = (halves[0].select(some) + halves[1].select(some)).centred()
            energies += torch.linalg.eigvalsh(_solved(moments, ridge)[1]).double().sum(0).flip(0).cpu()
    held = energies.clamp_min(0).cumsum(0)
    return min(most, int((held < plan.energy * held[-1]).sum()) + 1)


def _moments_of(
    stage: Stage, experts: Sequence[int]
) -> Iterator[tuple[int, int, tuple["Moments", "Moments"], tuple[Tensor, Tensor]]]:
    """Yield the first place, the number, and the moments of some of the experts at a time.

    Those of all experts of a layer are measured once if they take no more than HELD bytes.
    """
    config, n = stage.layer.config, stage.layer.config.num_experts
    of_one = 2 * 4 * (config.dim + 1) * (config.dim + config.output_width)
    if n * of_one <= HELD:
        if "moments" not in stage.shared:
            stage.shared["moments"] = measure(stage, range(n))
        halves, around = stage.shared["moments"]
        index = torch.tensor(experts, dtype=torch.int64)
        if len(experts):
            of_experts = halves[0].select(index), halves[1].select(index)
            yield 0, len(experts), of_experts, (around[0][index], around[1][index])
        return
    step = max(1, HELD // of_one)
    for start in range(0, len(experts), step):
        some = experts[start : start + step]
        yield start, len(some), *measure(stage, some)


def measure(stage: Stage, experts: Sequence[int]) -> tuple[tuple[Moments, Moments], tuple[Tensor, Tensor]]:
    """Return the moments of some experts of the dense layer, on either half of the inputs.

    They are of the differences of inputs and outputs from points near their means, (e,d) and (e,o), which are returned
    too: in float32 the sums of squares would otherwise hide variances that are small beside the means.
    """
    index = torch.tensor(experts, device=stage.layer.fc2_weight.device)
    near_outputs = stage.moments.term_mean.to(index.device)[index].mean(1)
    near_inputs: Tensor | None = None
    halves: list[Moments | None] = [None, None]
    for members, seen, _ in stage.observe():
        for which, places in enumerate(members):
            if not len(places):
                continue
            near_inputs, found = seen.select(places).moments(experts, near_inputs, near_outputs)
            known = halves[which]
            if known is None:
                halves[which] = Moments(*found)
            else:
                for total, part in zip(known, found, strict=True):
                    total += part
    first, second = (half for half in halves)
    if first is None or second is None:  # one input
        first = second = first or second
    assert first is not None
    assert second is not None
    assert near_inputs is not None
    return (first, second), (near_inputs, near_outputs)


def _shared(known: dict[Any, tuple[Tensor, Tensor]], key: Any, moments: Moments, ridge: float, rank: int) -> Any:
    """Return A (e,d,r) and B (e,r,o) of `reduced_rank`; those of a lower rank are the first of a higher one's."""
    if key not in known or known[key][0].shape[2] < rank:
        known[key] = reduced_rank(moments, ridge, rank)
    into, out_of = known[key]
    return into[:, :, :rank], out_of[:, :rank]


def choose_ridge(halves: tuple[Moments, Moments], rank: int, known: dict[Any, Any]) -> tuple[float, float]:
    """Return the ridge whose maps, fitted to one half, have the least error on the other, both ways; and by how much
    that is more than their error on the half that they are fitted to, for all experts.

    known: maps of the same experts, fitted before.
    """
    count = len(halves[0].weight)
    some = torch.linspace(0, count - 1, min(count, CHOOSING)).round().long()
    parts = [half.select(some) for half in halves]
    errors = []
    for ridge in RIDGES:
        error, of_fitted = 0.0, 0.0
        for which, (fitted, held_out) in enumerate((parts, parts[::-1])):
            own = fitted.centred()
            maps = _shared(known, (which, ridge), own, ridge, rank)
            error += _error(held_out, own, *maps)
            of_fitted += _error(fitted, own, *maps)
        errors.append((error, ridge, max(error - of_fitted, 0.0)))
    _, ridge, gap = min(errors)
    return ridge, gap * count / len(some)


def _error(held_out: Moments, fitted: Moments, into: Tensor, out_of: Tensor) -> float:
    """Return the squared error of maps A (e,d,r) and B (e,r,o), of orthonormal rows, around the means of `fitted`, on
    other inputs.
    """
    dtype = wide_dtype(into.device)
    weight, inputs, outputs, power, cross, square = (part.to(dtype) for part in held_out)
    into, out_of = into.to(dtype), out_of.to(dtype)
    constant = fitted.outputs.to(dtype) - (fitted.inputs.to(dtype)[:, None] @ into @ out_of)[:, 0]  # (e,o)
    error = square - 2 * (into * (cross @ out_of.mT)).sum((1, 2)) + (into * (power @ into)).sum((1, 2))
    error += weight * constant.square().sum(1) - 2 * (constant * outputs).sum(1)
    error += 2 * (constant * (inputs[:, None] @ into @ out_of)[:, 0]).sum(1)
    return float(error.sum())


def reduced_rank(moments: Moments, ridge: float, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (e,d,r) and B (e,r,o) of the best maps of a rank, from centred moments."""
    solution, explained = _solved(moments, ridge)
    directions = leading_directions(explained, rank)  # (e,o,r)
    return solution @ directions, directions.mT.contiguous()


def _solved(moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the maps X (e,d,o) of full rank, and the energies XᵀCov(s)X (e,o,o) of the directions of their outputs."""
    power = moments.power.clone()
    diagonal = power.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny ** 0.5)
    diagonal.add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(power)
    solution = torch.cholesky_solve(moments.cross, factor)  # (e,d,o)
    solution = solution.where((failed == 0)[:, None, None], 0)  # all inputs are the same, but for rounding
    return solution, solution.mT @ (moments.power @ solution)


def leading_directions(matrices: Tensor, rank: int) -> Tensor:
    """Return orthonormal eigenvectors of the largest eigenvalues of positive matrices (e,o,o): (e,o,r)."""
    width, follow = matrices.shape[2], rank + SPARE
    if width <= 4 * follow:
        return torch.linalg.eigh(matrices)[1][:, :, -rank:].flip(2)
    generator = torch.Generator().manual_seed(width)
    basis = torch.randn(width, follow, generator=generator).to(matrices).expand(len(matrices), -1, -1)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrices @ basis)[0]
    inner = torch.linalg.eigh(basis.mT @ matrices @ basis)[1][:, :, -rank:].flip(2)
    return basis @ inner
