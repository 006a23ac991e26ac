"""Low-rank maps in place of dropped experts, by reduced-rank regression.

Each dropped expert j becomes f(s) ≈ (s - mean s)·A·B + mean f, of rank r, which minimises the squared error of its own
outputs over its inputs s, each times the sum over tokens of its squared weights: its error in the layer's output.
The ridge solution X of f on s is projected on the r leading eigenvectors V of Xᵀ·Cov(s)·X (Izenman 1975): A = X·V,
B = Vᵀ. One ridge, in units of the mean variance of s, serves all experts; it is chosen by the error on held-out inputs.
Ranks differ: of the directions of all experts together, those with the largest eigenvalues are taken, which minimises
the sum of their errors.

Axes: e experts, p terms per expert, s steps of ranks, d width of the input, o of the output, r rank.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.sums import wide_dtype
from moeprune.calibration.walk import Stage
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer
from moeprune.plan import LayerPlan

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD = 512 << 20  # bytes of moments at once
CHOOSING = 8  # experts, spread evenly, by which the ridge is chosen
ITERATIONS = 8  # of the search for leading eigenvectors
SPARE = 8  # directions beyond the rank that it follows
SPREAD = 4  # the largest rank of a map, as a multiple of their mean
LADDER = (1, *(factor << shift for shift in range(16) for factor in (2, 3)))  # ranks: 1, 2, 3, 4, 6, 8, 12, 16, 24, …
NEGLIGIBLE = 1e-6  # share of the energy of all directions, below which one is left out


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


class Maps(NamedTuple):
    """Low-rank maps (s - inputs)·A·B + outputs of some experts, the directions of each by falling energy."""

    into: Tensor  # A (e,d,r)
    out_of: Tensor  # B (e,r,o)
    energies: Tensor  # of each direction: the squares of what it gives (e,r)
    inputs: Tensor  # (e,d)
    outputs: Tensor  # (e,o)


def fit_low_rank(stage: Stage, plan: LayerPlan) -> tuple[LayerPlan, Maps, float]:
    """Fit the low-rank maps of a layer that a plan of static scope prunes, or of all experts where it is routed.

    Returns the plan with the ranks decided, maps of at least these ranks in the order of the plan's `mapped`, and by
    how much the squared error of maps fitted to one half is larger on the other half, summed over experts.
    """
    most, known = _most_directions(stage.layer.config, plan), stage.shared.setdefault(("maps", *plan.mapped), {})
    found, gap = [], 0.0
    for start, count, halves, around in _moments_of(stage, plan.mapped):
        of_chunk = known.setdefault(start, {}) if count == len(plan.mapped) else {}  # of many, maps take much memory
        ridge, more = choose_ridge(halves, max(1, min(int(plan.rank or most), most)), of_chunk)
        gap += more
        for some in torch.arange(count).split(CHOOSING):
            moments = (halves[0].select(some) + halves[1].select(some)).centred()
            into, out_of, energies = _shared(of_chunk, ("both", int(some[0]), ridge), moments, ridge, most)
            near = around[0][some], around[1][some]
            found.append(Maps(into, out_of, energies, near[0] + moments.inputs, near[1] + moments.outputs))
    maps = Maps(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    if plan.ranks is None:
        ranks = decided_ranks(plan, maps.energies.to("cpu", torch.float64))
        mean = max(1, math.ceil(statistics.fmean(ranks)))
        plan = plan.replace(ranks=ranks, rank=plan.rank or mean, energy=None)
    return plan, maps, gap


def _most_directions(config: LayerConfig, plan: LayerPlan) -> int:
    """Return how many directions of each map are fitted: those that may be wanted."""
    most = min(config.dim, config.output_width)
    if plan.rank is None:
        return max(1, min(most, config.expert_width // 2))
    wanted = int(plan.rank) if plan.scope != "static" else max(SPREAD, int(SPREAD * plan.rank))
    return max([min(most, wanted), *(plan.ranks or ())])


def decided_ranks(plan: LayerPlan, energies: Tensor) -> tuple[int, ...]:
    """Return the rank of each map: what the directions with the largest energies (e,r) of all maps together make.

    They are as many as the plan's rank makes on average, or hold its share of the energy; none holds less than
    NEGLIGIBLE of it. Ranks are from LADDER, so that few of them differ, and maps of equal rank run together. Of a
    routed layer's maps, all have the same.
    """
    energies = energies.clamp_min(0)
    (count, most), total = energies.shape, float(energies.sum())
    if plan.scope != "static":
        rank = plan.rank
        if rank is None:
            assert plan.energy is not None
            rank = 1 + int((energies.sum(0).cumsum(0) < plan.energy * total).sum())
        return (min(int(rank), most),) * count
    ends = torch.tensor([*(rank for rank in LADDER if rank < most), most])
    lengths = ends.diff(prepend=ends.new_zeros(1)).repeat(count)  # of the steps from rank to rank (e·s)
    held = energies.cumsum(1)[:, ends - 1]
    steps = held.diff(prepend=held.new_zeros(count, 1)).flatten()
    order = (steps / lengths).argsort(descending=True, stable=True)
    if plan.rank is None:
        is_wanted = steps[order].cumsum(0) - steps[order] < (plan.energy or 0) * total
    else:
        is_wanted = lengths[order].cumsum(0) <= max(1, plan.rank * count)
    taken = order[is_wanted & ((steps / lengths)[order] > NEGLIGIBLE * total)]
    ranks = lengths.new_zeros(count).index_add_(0, taken // len(ends), lengths[taken])
    return tuple(ranks.tolist())


def set_maps(layer: MoELayer, maps: Maps) -> None:
    """Set the low-rank maps of a pruned layer and the constants of their experts, in place."""
    plan = layer.plan
    assert plan is not None
    assert plan.ranks is not None
    surrogate, ranks = layer.surrogate, plan.ranks
    first = len(surrogate) - len(ranks)
    order = torch.tensor(sorted(range(len(ranks)), key=lambda place: -ranks[place]), dtype=torch.int64)
    constants = maps.outputs[order]
    for places, into, out_of in layer.maps():
        some, rank = order[places], into.shape[2]
        into.copy_(maps.into[some, :, :rank])
        out_of.copy_(maps.out_of[some, :rank])
        constants[places] -= (maps.inputs[some, None] @ maps.into[some, :, :rank] @ maps.out_of[some, :rank])[:, 0]
    surrogate[first:] = constants[:, None].to(surrogate)


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


def _shared(
    known: dict[Any, Any], key: Any, moments: Moments, ridge: float, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `reduced_rank` does; the directions of a lower rank are the first of a higher one's."""
    if key not in known or known[key][0].shape[2] < rank:
        known[key] = reduced_rank(moments, ridge, rank)
    into, out_of, energies = known[key]
    return into[:, :, :rank], out_of[:, :rank], energies[:, :rank]


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
            into, out_of, _ = _shared(known, (which, ridge), own, ridge, rank)
            error += _error(held_out, own, into, out_of)
            of_fitted += _error(fitted, own, into, out_of)
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


def reduced_rank(moments: Moments, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (e,d,r) and B (e,r,o) of the best maps of a rank, from centred moments, and the energies of their
    directions (e,r), the largest first: the squares of what each gives.
    """
    power = moments.power.clone()
    diagonal = power.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny ** 0.5)
    diagonal.add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(power)
    solution = torch.cholesky_solve(moments.cross, factor)  # (e,d,o)
    solution = solution.where((failed == 0)[:, None, None], 0)  # all inputs are the same, but for rounding
    explained = solution.mT @ (moments.power @ solution)  # (e,o,o)
    directions = leading_directions(explained, rank)  # (e,o,r)
    energies = (directions * (explained @ directions)).sum(1)
    return solution @ directions, directions.mT.contiguous(), energies


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
