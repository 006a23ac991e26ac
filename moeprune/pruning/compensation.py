"""Fit what compensates for dropped experts: regressions on data, without labels.

The pruned layer gives Y' = sum over kept experts of R_j + sum over dropped ones of w_j·mu_j. It lacks
T = Y - Y', where Y is the output of the same layer in the unpruned model, so that T also holds what pruned
layers before it broke. The regression of T on

    lstsq    the weights of all terms, without those that ran for their own input (a static set may correct
             kept terms too: that costs nothing)
    affine   the same, the layer's input X, the mean of its tokens, and 1

is added to the surrogates; lambda → infinity leaves `mean`. Behind `affine`, `refit` regresses what is then
still lacking on the same and on what the kept experts' last linears take, times the experts' weights: that
changes those linears and costs nothing at inference.

Axes: b inputs, m tokens, d width of the input, o of the output, n experts, p terms per expert, q regressors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.passes import observe_layers
from moeprune.calibration.ridge import Equations, solve_held_out
from moeprune.calibration.statistics import LayerMoments, MomentsAccumulator
from moeprune.calibration.sums import Contributions, halves, wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.layers.observation import Observation
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan, Plan

MAX_REGRESSORS = 4096
"""Regressors that `refit` takes at most: their Gram matrix is held in float64, and decomposed."""


@dataclass(frozen=True)
class Stream:
    """A layer of a model whose layers before it are pruned, seen beside the same layer of the full model.

    pruned, full: private copies.
    """

    pruned: Model
    full: Model
    name: str
    data: Dataset
    runtime: Runtime

    @property
    def layer(self) -> MoELayer:
        """The layer of the pruned model."""
        return self.pruned.moe_layers[self.name]

    def __iter__(self) -> Iterator[tuple[list[Tensor], Observation, Tensor]]:
        """Yield for each batch the inputs in either half, the pruned model's observation of the layer, and
        what its output lacks to the full model's (b,m,o).
        """
        device = self.runtime.torch_device
        self.pruned.to(device)
        self.full.to(device)
        count = 0
        seen: list[Observation] = []
        for inputs, _ in self.runtime.batches(self.data, f"fit {self.name}"):
            seen.clear()
            for model in (self.full, self.pruned):
                observe_layers(model, [self.name], lambda _, found: seen.append(found), inputs, self.runtime)
            full, pruned = seen
            members = [half.to(device) for half in halves(count, len(inputs))]
            count += len(inputs)
            yield members, pruned, full.output.float() - pruned.output.float()


class Gathered(NamedTuple):
    """The moments of a dense layer behind pruned ones, and its contributions over each half of the data.

    Their gap is what the unpruned model's layer gives beyond this one's.
    """

    moments: LayerMoments
    halves: tuple[Contributions, Contributions]


def gather(stream: Stream, compensation: str) -> Gathered:
    """Sum up what any static set takes whose compensation is fitted; the stream's layer is dense."""
    layer = stream.layer.to(stream.runtime.torch_device)
    moments = MomentsAccumulator(layer)
    sums = Contributions(layer, compensation), Contributions(layer, compensation)
    for members, seen, gap in stream:
        moments.add(seen, None)
        for half, index in zip(sums, members, strict=True):
            half.add(seen.select(index), gap[index])
    return Gathered(moments.result(), sums)


def fit_routed(stream: Stream, compensation: str) -> tuple[Tensor, Tensor]:
    """Fit one correction (`lstsq` or `affine`) for all subsets of experts, over those that the inputs choose.

    stream: of a routed layer whose surrogates are means. Returns V (q,o) and ZᵀZ (q,q) of its regressors.
    """
    layer = stream.layer
    kinds = layer.regressor_kinds(compensation)
    equations = _Halves(sum(kinds), layer.config.output_width, stream.runtime.torch_device)
    for members, seen, gap in stream:
        equations.add(members, seen.regressors(compensation), gap)
    return equations.solve(kinds), equations.power[0] + equations.power[1]


def fit_static(gathered: Gathered, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Fit the correction of a static layer whose surrogates are means.

    Returns V (q,o) and ZᵀZ (q,q) of its regressors, both in the order of the layer's columns.
    """
    first, second = gathered.halves
    mean, dropped = gathered.moments.term_mean, plan.dropped
    equations = first.equations(dropped, mean), second.equations(dropped, mean)
    correction = solve_held_out(*equations, first.kinds)
    n, p, _ = mean.shape
    rows = torch.arange(len(correction))
    rows[: n * p] = rows[: n * p].view(n, p)[list(plan.columns)].flatten()
    power = equations[0].power + equations[1].power
    return correction[rows], power[rows][:, rows]


def refit_kept(stream: Stream) -> None:
    """Fit the last linears of a static layer's kept experts, in place, behind `affine`."""
    layer = stream.layer
    k, out, width = layer.fc2_weight.shape
    kinds = [k * width, *layer.regressor_kinds("affine")]
    equations = _Halves(sum(kinds), out, stream.runtime.torch_device)
    for members, seen, gap in stream:
        rows = torch.cat([seen.weighted_hidden(), seen.regressors("affine")], dim=2)
        equations.add(members, rows, gap)
    correction = equations.solve(kinds)
    of_weights = correction[: k * width].view(k, width, out).mT
    layer.fc2_weight = torch.nn.Parameter(layer.fc2_weight + of_weights.to(layer.fc2_weight), False)
    add_correction(layer, correction[k * width :])


def require_affordable_refits(configs: Mapping[str, LayerConfig], plan: Plan) -> None:
    """Raise a MoepruneError if the refit of a layer would take more than MAX_REGRESSORS regressors."""
    for name, layer in plan.items():
        if (regressors := _refit_regressors(configs[name], layer)) > MAX_REGRESSORS:
            raise MoepruneError(
                f"`refit` of layer `{name}` would take {regressors:,} regressors: {layer.k} experts of width"
                f" {configs[name].expert_width} are kept; at most {MAX_REGRESSORS:,} are possible",
                "keep fewer experts, or give `--compensate affine`",
            )


def is_affordable(configs: Mapping[str, LayerConfig], plan: Plan) -> bool:
    """Return True if no refit of the plan takes more than MAX_REGRESSORS regressors."""
    return all(_refit_regressors(configs[name], plan[name]) <= MAX_REGRESSORS for name in plan)


def _refit_regressors(config: LayerConfig, plan: LayerPlan) -> int:
    if plan.compensation != "refit" or not plan.drops:
        return 0
    terms = config.num_experts * config.terms_per_expert
    return plan.k * config.expert_width + terms + 2 * config.dim + 1


class _Halves:
    """The normal equations of one regression over two halves of the data."""

    def __init__(self, num_regressors: int, out: int, device: torch.device):
        zero = torch.zeros((), device=device, dtype=wide_dtype(device))
        self.power = [zero.new_zeros(num_regressors, num_regressors) for _ in range(2)]
        self.cross = [zero.new_zeros(num_regressors, out) for _ in range(2)]

    def add(self, members: list[Tensor], rows: Tensor, targets: Tensor) -> None:
        """Add regressors (b,m,q) and targets (b,m,o), by the halves that the inputs are in."""
        for half, index in enumerate(members):
            z, t = (part[index].flatten(0, 1).to(self.power[half]) for part in (rows, targets))
            self.power[half] += z.mT @ z
            self.cross[half] += z.mT @ t

    def solve(self, kinds: list[int]) -> Tensor:
        """Return V (q,o), with the ridge strength chosen by held-out error."""
        pairs = zip(self.power, self.cross, strict=True)
        first, second = (Equations(*(part.to("cpu", torch.float64) for part in pair)) for pair in pairs)
        return solve_held_out(first, second, kinds)


def add_correction(layer: MoELayer, correction: Tensor) -> None:
    """Add V (q,o) to the compensation of a pruned layer, in place."""
    for name, rows in layer.split_rows(correction.to(layer.surrogate)).items():
        getattr(layer, name).add_(rows)


def narrowed(layer: MoELayer, wanted: LayerPlan, power: Tensor, tokens: int) -> MoELayer:
    """Return the layer with its compensation in the output directions that a plan's rank or energy asks for.

    Of all matrices of rank r the nearest to the Z·V that a compensation adds is Z·V·Bᵀ·B, where the rows of B
    are the first r eigenvectors of VᵀZᵀZ·V (Eckart and Young 1936); the eigenvalues are the energies of the
    directions. V·Bᵀ (q,r) and B (r,o) are stored. With an energy, r is the least that holds it; where that is
    no cheaper, the layer is returned as it is.

    Args:
        layer: pruned, with a fitted compensation in full.
        wanted: has a rank or an energy.
        power: ZᵀZ (q,q), summed over calibration data, in the order of the layer's columns.
        tokens: of one input.
    """
    assert layer.plan is not None
    added = layer.rows()
    energies, directions = torch.linalg.eigh(added.mT @ power.to("cpu", torch.float64) @ added)
    rank = wanted.rank
    if rank is None:
        assert wanted.energy is not None
        held = energies.flip(0).clamp_min(0).cumsum(0)
        rank = int((held < wanted.energy * held[-1]).sum()) + 1
    plan = layer.plan.replace(rank=rank)
    if wanted.rank is None:
        cost, in_full = (layer.config.flops(tokens, p).compensation for p in (plan, layer.plan))
        if cost >= in_full:
            return layer
    basis = directions[:, -rank:].flip(1).mT  # (r,o)
    narrow = {**layer.split_rows(added @ basis.mT), "basis": basis}
    tensors = {name: tensor.to(layer.surrogate).contiguous() for name, tensor in narrow.items()}
    return layer_of_tensors(layer.config, plan, {**layer.state_dict(), **tensors})
