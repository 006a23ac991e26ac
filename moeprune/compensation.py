"""What stands in for dropped experts so that the unpruned model is met best: regressions on data.

The layer of the pruned model gives Y' = sum over kept C·f + sum over dropped C·mu. What it lacks is
T = Y - Y', where Y is the output of the same layer in the unpruned model: T also holds what the
pruned layers before this one broke. The regression of T on

    lstsq    C, without the columns of slots that run for their own input (a static set may correct kept
             slots too: that costs nothing)
    affine   the same, the layer's input X, the mean of its tokens, and 1

is added to the surrogates (moeprune.regression). lambda → infinity leaves `mean`.

Axes: b inputs, m tokens, d width of the input, o of the output, n experts, p slots per expert, q regressors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.calibration import observe_layers
from moeprune.contributions import Contributions, half_of, kinds_of_regressors, regressors, wide_dtype
from moeprune.data import Dataset
from moeprune.model import Model, soft_moe_layers
from moeprune.plan import LayerPlan
from moeprune.regression import Equations, solve_held_out
from moeprune.runtime import Runtime
from moeprune.soft_moe import Observation, SoftMoE, select
from moeprune.statistics import LayerMoments, MomentsAccumulator


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
    """What a static set takes that is chosen for and compensated by `lstsq` or `affine`.

    Args:
        pruned: with the layers before the named one pruned, and that one dense.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
    """
    moments, halves = None, None
    for members, seen, gap in _observed(pruned, full, name, data, runtime):
        if moments is None or halves is None:
            layer = soft_moe_layers(pruned)[name]
            moments = MomentsAccumulator(layer)
            halves = Contributions(layer, compensation), Contributions(layer, compensation)
        moments.add(seen, None)
        for half, index in zip(halves, members, strict=True):
            half.add(select(seen, index), gap[index])
    assert moments is not None
    assert halves is not None
    return Gathered(moments.result(), halves)


def fit_routed(
    pruned: Model, full: Model, name: str, data: Dataset, compensation: str, runtime: Runtime
) -> Tensor:
    """V (q,o): what to add to a routed layer by the regression of what it lacks, by one pass over data.

    One V for all subsets of experts, fitted over those that the inputs choose.

    Args:
        pruned: with the layer and those before it pruned, the layer's surrogate being `mean`.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
    """
    device = runtime.torch_device
    layer = soft_moe_layers(pruned)[name]
    kinds, out = kinds_of_regressors(layer, compensation), layer.config.output_width
    dtype = wide_dtype(device)
    power = [torch.zeros(sum(kinds), sum(kinds), device=device, dtype=dtype) for _ in range(2)]
    cross = [torch.zeros(sum(kinds), out, device=device, dtype=dtype) for _ in range(2)]
    for members, seen, gap in _observed(pruned, full, name, data, runtime):
        rows = regressors(seen, compensation)
        for half, index in enumerate(members):
            z, targets = rows[index].flatten(0, 1).to(dtype), gap[index].flatten(0, 1).to(dtype)
            power[half] += z.mT @ z
            cross[half] += z.mT @ targets
    first, second = (
        Equations(p.to("cpu", torch.float64), c.to("cpu", torch.float64))
        for p, c in zip(power, cross, strict=True)
    )
    return solve_held_out(first, second, kinds)


def fit_static(gathered: Gathered, plan: LayerPlan) -> Tensor:
    """V (q,o): what to add to a static layer, whose surrogates are means; by the order of its columns."""
    first, second = gathered.halves
    mean, dropped = gathered.moments.slot_mean, plan.dropped
    halves = first.equations(dropped, mean), second.equations(dropped, mean)
    correction = solve_held_out(*halves, first.kinds)
    n, p, _ = mean.shape
    of_slots = correction[: n * p].unflatten(0, (n, p))[list(plan.columns)]
    return torch.cat([of_slots.flatten(0, 1), correction[n * p :]])


def add_correction(layer: SoftMoE, correction: Tensor) -> None:
    """Add V (q,o) to what stands in for the dropped experts of a pruned layer, in place.

    Its rows are of the layer's slots in the order of phi's columns, then for `affine` of the input's
    tokens, of their mean, and of the bias.
    """
    n, p, _ = layer.slot_shape
    correction = correction.to(layer.surrogate)
    layer.surrogate += correction[: n * p].unflatten(0, (n, p))
    if layer.plan is not None and layer.plan.has_affine:
        token, mean, bias = correction[n * p :].split([layer.config.dim, layer.config.dim, 1])
        layer.affine_token += token
        layer.affine_mean += mean
        layer.affine_bias += bias[0]


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
        half = half_of(count, len(inputs))
        count += len(inputs)
        members = [(half == h).nonzero().flatten().to(device) for h in (0, 1)]
        gap = observed["full"].output.float() - observed["pruned"].output.float()
        yield members, observed["pruned"], gap
