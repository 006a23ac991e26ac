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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeprune.calibration.passes import observe_layers
from moeprune.calibration.ridge import Equations, solve_held_out
from moeprune.calibration.statistics import LayerMoments, MomentsAccumulator
from moeprune.calibration.sums import Contributions, Halves, halves, wide_dtype
from moeprune.data.datasets import Dataset
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.layers.observation import Observation
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan, Plan

MAX_REGRESSORS = 4096  # regressors that `refit` takes at most: their Gram matrix is held in float64, and decomposed


@dataclass(frozen=True)
class Stream:
    """A layer of a model whose layers before it are pruned, seen beside the same layer of the full model.

    pruned, full: private copies, on the runtime's device. data: None if nothing is measured.
    """

    pruned: Model
    full: Model
    name: str
    data: Dataset | None
    runtime: Runtime

    @property
    def layer(self) -> MoELayer:
        """The layer of the pruned model."""
        return self.pruned.moe_layers[self.name]

    def __iter__(self) -> Iterator[tuple[list[Tensor], Observation, Tensor]]:
        """Yield for each batch the inputs in either half, the pruned model's observation of the layer, and
        what its output lacks to the full model's (b,m,o).
        """
        assert self.data is not None
        count = 0
        seen: list[Observation] = []
        for inputs, _ in self.runtime.batches(self.data, f"fit {self.name}"):
            seen.clear()
            for model in (self.full, self.pruned):
                observe_layers(model, [self.name], lambda _, found: seen.append(found), inputs, self.runtime)
            full, pruned = seen
            members = [half.to(self.runtime.torch_device) for half in halves(count, len(inputs))]
            count += len(inputs)
            gap = full.output.float() - pruned.output.float()
            yield members, pruned, gap.reshape(len(inputs), -1, gap.shape[-1])  # the tokens of all windows


def gather(stream: Stream, compensation: str) -> tuple[LayerMoments, Halves]:
    """Return the moments of the stream's layer, which is dense, and the sums that a fitted compensation takes.

    The gap of the sums is what the unpruned model's layer gives beyond this one's.
    """
    layer = stream.layer
    moments = MomentsAccumulator(layer)
    sums = Contributions(layer, compensation), Contributions(layer, compensation)
    for members, seen, gap in stream:
        moments.add(seen, None)
        for half, index in zip(sums, members, strict=True):
            half.add(seen.select(index), gap[index])
    return moments.result(), sums


def fit(stream: Stream, wanted: LayerPlan, moments: LayerMoments, sums: Halves | None) -> None:
    """Fit the compensation of the stream's pruned layer, whose surrogates are means, in place.

    wanted: its plan, with the rank or energy that it lacks so far. moments, sums: what `gather` returned, with
    scope static.
    """
    layer, compensation = stream.layer, wanted.compensation
    correction, power = regress(stream, compensation) if sums is None else regress_static(moments, sums, wanted)
    add_correction(layer, correction)
    if compensation == "refit" and wanted.k:
        refit_kept(stream)
    if wanted != layer.plan:
        narrow = narrowed(layer, wanted, power, stream.full.config.tokens(stream.name))
        stream.pruned.set_submodule(stream.name, narrow)


def regress(stream: Stream, compensation: str, with_hidden: bool = False) -> tuple[Tensor, Tensor]:
    """Fit one correction (`lstsq` or `affine`) for all subsets of experts, over those that the inputs choose.

    Returns V (q,o) and ZᵀZ (q,q) of the regressors. with_hidden: the first of them are what the kept experts'
    last linears take (k·h).
    """
    kinds = stream.layer.regressor_kinds(compensation)
    k, out, width = stream.layer.fc2_weight.shape
    if with_hidden:
        kinds = [k * width, *kinds]
    q, device = sum(kinds), stream.runtime.torch_device
    sums = [[torch.zeros(q, size, device=device, dtype=wide_dtype(device)) for size in (q, out)] for _ in range(2)]
    for members, seen, gap in stream:
        rows = seen.regressors(compensation)
        if with_hidden:
            rows = torch.cat([seen.weighted_hidden(), rows], dim=2)
        for (power, cross), index in zip(sums, members, strict=True):
            z, t = (part.reshape(len(gap), -1, part.shape[-1])[index].flatten(0, 1).to(power) for part in (rows, gap))
            power += z.mT @ z
            cross += z.mT @ t
    first, second = (Equations(*(part.to("cpu", torch.float64) for part in half)) for half in sums)
    return solve_held_out(first, second, kinds), first.power + second.power


def regress_static(moments: LayerMoments, sums: Halves, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """Fit the correction of a static layer; return V (q,o) and ZᵀZ (q,q) in the order of the layer's columns."""
    mean = moments.term_mean
    first, second = (half.equations(plan.dropped, mean) for half in sums)
    correction = solve_held_out(first, second, sums[0].kinds)
    n, p, _ = mean.shape
    rows = torch.arange(len(correction))
    rows[: n * p] = rows[: n * p].view(n, p)[list(plan.columns)].flatten()
    return correction[rows], (first.power + second.power)[rows][:, rows]


def refit_kept(stream: Stream) -> None:
    """Fit the last linears of a static layer's kept experts, in place, behind `affine`."""
    layer = stream.layer
    k, out, width = layer.fc2_weight.shape
    correction, _ = regress(stream, "affine", with_hidden=True)
    of_weights = correction[: k * width].view(k, width, out).mT
    layer.fc2_weight = torch.nn.Parameter(layer.fc2_weight + of_weights.to(layer.fc2_weight), False)
    add_correction(layer, correction[k * width :])


def add_correction(layer: MoELayer, correction: Tensor) -> None:
    """Add V (q,o) to the compensation of a pruned layer, in place."""
    for name, rows in layer.split_rows(correction.to(layer.surrogate)).items():
        getattr(layer, name).add_(rows)


def too_large_refits(configs: Mapping[str, LayerConfig], plan: Plan) -> dict[str, int]:
    """Return the number of regressors of each layer whose `refit` would take more than MAX_REGRESSORS."""
    found = {}
    for name, layer in plan.items():
        config = configs[name]
        count = layer.k * config.expert_width + config.num_experts * config.terms_per_expert + 2 * config.dim + 1
        if layer.compensation == "refit" and layer.drops and count > MAX_REGRESSORS:
            found[name] = count
    return found


def narrowed(layer: MoELayer, wanted: LayerPlan, power: Tensor, tokens: int) -> MoELayer:
    """Return the layer with its compensation in the output directions that a plan's rank or energy asks for.

    Of all matrices of rank r the nearest to the Z·V that a compensation adds is Z·V·Bᵀ·B, where the rows of B
    are the first r eigenvectors of VᵀZᵀZ·V (Eckart and Young 1936); the eigenvalues are the energies of the
    directions. V·Bᵀ (q,r) and B (r,o) are stored. With an energy, r is the least that holds it; where that is
    no cheaper, the layer is returned as it is.

    layer: pruned, with a fitted compensation in full. power: ZᵀZ (q,q) over calibration data, in the order of the
    layer's columns. tokens: of one input.
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
    cost, in_full = (layer.config.flops(tokens, each).compensation for each in (plan, layer.plan))
    if wanted.rank is None and cost >= in_full:
        return layer
    basis = directions[:, -rank:].flip(1).mT  # (r,o)
    narrow = {**layer.split_rows(added @ basis.mT), "basis": basis}
    tensors = {name: tensor.to(layer.surrogate).contiguous() for name, tensor in narrow.items()}
    return layer_of_tensors(layer.config, plan, {**layer.state_dict(), **tensors})
