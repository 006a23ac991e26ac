"""What stands in for dropped experts so that the unpruned model is met best: regressions on data.

The layer of the pruned model gives Y' = sum over kept C·f + sum over dropped C·mu. What it lacks is
T = Y - Y', where Y is the output of the same layer in the unpruned model: T also holds what the
pruned layers before this one broke. The regression of T on

    lstsq    C, without the columns of slots that run for their own input (a static set may correct kept
             slots too: that costs nothing)
    affine   the same, the layer's input X, the mean of its tokens, and 1

is added to the surrogates. lambda → infinity leaves `mean`. Behind `affine`, `refit`
regresses what is then still lacking on the same and on what the last linears of the kept experts take,
each weighted by its combine weights: that changes those weights, and costs nothing at inference.

Axes: b inputs, m tokens, d width of the input, o of the output, n experts, p slots per expert, q regressors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.analysis import observe_layers
from moeprune.calibration.ridge import Equations, solve_held_out
from moeprune.calibration.statistics import LayerMoments, MomentsAccumulator
from moeprune.calibration.sums import (
    Contributions,
    added_tensors,
    halves,
    kinds_of_regressors,
    regressors,
    wide_dtype,
)
from moeprune.data.datasets import Dataset
from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import Observation, SoftMoE, select
from moeprune.models.model import Model
from moeprune.models.runtime import Runtime
from moeprune.plan import LayerPlan

MAX_REGRESSORS = 4096
"""Regressors that `refit` takes at most: their Gram matrix is held in float64, and decomposed."""


class Gathered(NamedTuple):
    """What one pass over data says of a dense layer behind pruned ones.

    moments: of its experts. halves: what they add, over each half of the data; the gap is what the
    unpruned model's layer gives beyond this one's.
    """

    moments: LayerMoments
    halves: tuple[Contributions, Contributions]


def gather(
    pruned: Model, full: Model, name: str, data: Dataset, compensation: str, runtime: Runtime
) -> Gathered:
    """What a static set takes whose compensation is found on data.

    Args:
        pruned: with the layers before the named one pruned, and that one dense.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
    """
    moments, sums = None, None
    for members, seen, gap in _observed(pruned, full, name, data, runtime):
        if moments is None or sums is None:
            layer = pruned.moe_layers[name]
            moments = MomentsAccumulator(layer)
            sums = Contributions(layer, compensation), Contributions(layer, compensation)
        moments.add(seen, None)
        for half, index in zip(sums, members, strict=True):
            half.add(select(seen, index), gap[index])
    assert moments is not None
    assert sums is not None
    return Gathered(moments.result(), sums)


def fit_routed(
    pruned: Model, full: Model, name: str, data: Dataset, compensation: str, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """V (q,o): what to add to a routed layer by the regression of what it lacks, by one pass over data; and
    ZᵀZ (q,q) of its regressors.

    One V for all subsets of experts, fitted over those that the inputs choose.

    Args:
        pruned: with the layer and those before it pruned, the layer's surrogate being `mean`.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
    """
    layer = pruned.moe_layers[name]
    kinds = kinds_of_regressors(layer, compensation)
    equations = _Halves(sum(kinds), layer.config.output_width, runtime.torch_device)
    for members, seen, gap in _observed(pruned, full, name, data, runtime):
        equations.add(members, regressors(seen, compensation), gap)
    return equations.solve(kinds), equations.power[0] + equations.power[1]


def fit_static(gathered: Gathered, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """V (q,o): what to add to a static layer, whose surrogates are means; and ZᵀZ (q,q) of its regressors.
    Both are by the order of the layer's columns.
    """
    first, second = gathered.halves
    mean, dropped = gathered.moments.slot_mean, plan.dropped
    equations = first.equations(dropped, mean), second.equations(dropped, mean)
    correction = solve_held_out(*equations, first.kinds)
    n, p, _ = mean.shape
    rows = torch.arange(len(correction))
    rows[: n * p] = rows[: n * p].view(n, p)[list(plan.columns)].flatten()
    power = equations[0].power + equations[1].power
    return correction[rows], power[rows][:, rows]


def refit_kept(pruned: Model, full: Model, name: str, data: Dataset, runtime: Runtime) -> None:
    """Fit the last linears of a static layer's kept experts, in place, by one pass over data.

    Args:
        pruned: with the layer, compensated by `affine`, and those before it pruned.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
    """
    layer = pruned.moe_layers[name]
    k, out, width = layer.fc2_weight.shape
    kinds = [k * width, *kinds_of_regressors(layer, "affine")]
    equations = _Halves(sum(kinds), out, runtime.torch_device)
    for members, seen, gap in _observed(pruned, full, name, data, runtime):
        assert seen.slot_inputs is not None
        hidden = layer.hidden(seen.slot_inputs.to(layer.fc2_weight.dtype)).float()  # (b,k,p,h)
        weights = seen.combine_weights[:, :, :k].float()
        of_experts = torch.einsum("bmkp,bkph->bmkh", weights, hidden).flatten(2)
        equations.add(members, torch.cat([of_experts, regressors(seen, "affine")], dim=2), gap)
    correction = equations.solve(kinds)
    of_weights = correction[: k * width].view(k, width, out).mT
    layer.fc2_weight = torch.nn.Parameter(layer.fc2_weight + of_weights.to(layer.fc2_weight), False)
    add_correction(layer, correction[k * width :])


def require_affordable_refit(config: SoftMoEConfig, plan: LayerPlan, name: str) -> None:
    """Raise a MoepruneError if a layer's refit would take more than MAX_REGRESSORS regressors."""
    if not is_affordable_refit(config, plan):
        regressors = _refit_regressors(config, plan)
        raise MoepruneError(
            f"`refit` of layer `{name}` takes {regressors:,} regressors: {plan.k} experts of width"
            f" {config.expert_width} are kept; {MAX_REGRESSORS:,} are possible",
            "keep fewer experts, or give `--compensate affine`",
        )


def is_affordable_refit(config: SoftMoEConfig, plan: LayerPlan) -> bool:
    """Whether a layer's plan takes no refit, or one with MAX_REGRESSORS regressors at most."""
    is_refit = plan.compensation == "refit" and plan.drops
    return not is_refit or _refit_regressors(config, plan) <= MAX_REGRESSORS


def _refit_regressors(config: SoftMoEConfig, plan: LayerPlan) -> int:
    n, p, d = config.num_experts, config.slots_per_expert, config.dim
    return plan.k * config.expert_width + n * p + 2 * d + 1


class _Halves:
    """The normal equations of one regression over two halves of the data."""

    def __init__(self, num_regressors: int, out: int, device: torch.device):
        dtype = wide_dtype(device)
        self.power = [
            torch.zeros(num_regressors, num_regressors, device=device, dtype=dtype) for _ in range(2)
        ]
        self.cross = [torch.zeros(num_regressors, out, device=device, dtype=dtype) for _ in range(2)]

    def add(self, members: list[Tensor], rows: Tensor, targets: Tensor) -> None:
        """Add inputs: regressors (b,m,q) and targets (b,m,o), by the halves that their members are of."""
        for half, index in enumerate(members):
            z, t = (part[index].flatten(0, 1).to(self.power[half]) for part in (rows, targets))
            self.power[half] += z.mT @ z
            self.cross[half] += z.mT @ t

    def solve(self, kinds: list[int]) -> Tensor:
        """V (q,o); see moeprune.calibration.ridge.solve_held_out."""
        first, second = (
            Equations(power.to("cpu", torch.float64), cross.to("cpu", torch.float64))
            for power, cross in zip(self.power, self.cross, strict=True)
        )
        return solve_held_out(first, second, kinds)


def add_correction(layer: SoftMoE, correction: Tensor) -> None:
    """Add V (q,o) to what stands in for the dropped experts of a pruned layer, in place.

    Its rows are of the layer's slots in the order of phi's columns, then for `affine` of the input's
    tokens, of their mean, and of the bias.
    """
    for name, rows in added_tensors(layer, correction.to(layer.surrogate)).items():
        getattr(layer, name).add_(rows)


def _observed(
    pruned: Model, full: Model, name: str, data: Dataset, runtime: Runtime
) -> Iterator[tuple[list[Tensor], Observation, Tensor]]:
    """For each batch: which inputs are in either half, the pruned model's observation of a layer, and what
    its output (b,m,o) lacks to the full model's.
    """
    device = runtime.torch_device
    pruned.to(device)
    full.to(device)
    count = 0
    observed: dict[str, Observation] = {}
    for inputs, _ in runtime.batches(data, f"fit {name}"):
        for which, model in (("full", full), ("pruned", pruned)):

            def observe(_: str, observation: Observation, which: str = which) -> None:
                observed[which] = observation

            observe_layers(model, [name], observe, inputs, runtime)
        members = [half.to(device) for half in halves(count, len(inputs))]
        count += len(inputs)
        gap = observed["full"].output.float() - observed["pruned"].output.float()
        yield members, observed["pruned"], gap
