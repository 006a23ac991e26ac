"""The surrogate outputs of dropped experts that fit the unpruned model best: a ridge regression.

Axes: b inputs, m tokens, d model width, S = n·p slots.

The layer of the pruned model gives Y' = sum over kept C·f + sum over dropped C·mu. What it lacks is
T = Y - Y', where Y is the output of the same layer in the unpruned model: T also holds what the
pruned layers before this one broke. `lstsq` solves

    min over V of  E |T - R·V|² + lambda·|V|²

where R is C with the columns that may carry a correction (dropped slots; for a static set all), and
its columns are scaled to unit power (those weaker than WEAKEST times the strongest as if they had
that: their coefficients would be huge, and all noise). Of the lambdas whose error on held-out inputs
is least, up to GAIN_KEPT of what there is to gain, the strongest is taken: that makes coefficients
several times smaller, which narrow floats need. lambda → infinity leaves V = 0, which is `mean`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.calibration import observe_layers
from moeprune.data import Dataset
from moeprune.model import Model, soft_moe_layers
from moeprune.runtime import Runtime
from moeprune.soft_moe import Observation
from moeprune.statistics import wide_dtype

LAMBDAS = [10.0**exponent for exponent in range(-6, 3)]
WEAKEST = 0.01
GAIN_KEPT = 0.95


def fit_correction(
    pruned: Model, full: Model, name: str, data: Dataset, seed: int, runtime: Runtime
) -> Tensor:
    """V: what to add to the surrogates of layer `name` of the pruned model, by one pass over data.

    Args:
        pruned: with the layer and those before it pruned, the layer's surrogate being `mean`.
        full: the unpruned model. Both are private copies and moved to the runtime's device.
        seed: draws the two halves of the data on which lambda is chosen.

    Returns:
        (n,p,d) in float32 on the CPU, in the order of phi's columns.
    """
    device = runtime.torch_device
    pruned.to(device)
    full.to(device)
    layer = soft_moe_layers(pruned)[name]
    n, p, d = layer.slot_shape
    halves = [NormalEquations(n * p, d, device) for _ in range(2)]
    generator = torch.Generator().manual_seed(seed)
    half_of = torch.randperm(data.samples, generator=generator) % 2
    seen = 0
    observed: dict[str, Observation] = {}
    for inputs, _ in runtime.batches(data, f"lstsq {name}"):
        for which, model in (("full", full), ("pruned", pruned)):

            def observe(_: str, observation: Observation, which: str = which) -> None:
                observed[which] = observation

            observe_layers(model, [name], observe, inputs, runtime)
        targets = observed["full"].output.float() - observed["pruned"].output.float()
        regressors = correctable_weights(observed["pruned"])
        half = half_of[seen : seen + len(inputs)]
        for index, equations in enumerate(halves):
            members = (half == index).nonzero().flatten().to(device)
            equations.add(regressors[members], targets[members])
        seen += len(inputs)
    return solve_held_out(*halves).view(n, p, d).to("cpu", torch.float32)


def correctable_weights(observation: Observation) -> Tensor:
    """R (b,m,S): the combine weights, without those of the slots that ran for their own input."""
    combine_weights = observation.combine_weights.float()
    if observation.chosen is not None:
        dropped = torch.ones_like(combine_weights[:, 0, :, 0])  # (b,n)
        dropped.scatter_(1, observation.chosen, 0)
        combine_weights = combine_weights * dropped[:, None, :, None]
    return combine_weights.flatten(2)


class NormalEquations:
    """RᵀR (S,S) and RᵀT (S,d) of a least-squares problem, summed over batches."""

    def __init__(self, num_slots: int, dim: int, device: torch.device):
        dtype = wide_dtype(device)
        self.power = torch.zeros(num_slots, num_slots, device=device, dtype=dtype)
        self.cross = torch.zeros(num_slots, dim, device=device, dtype=dtype)

    def add(self, regressors: Tensor, targets: Tensor) -> None:
        """Add inputs: regressors (b,m,S) and targets (b,m,d)."""
        rows, goals = regressors.flatten(0, 1).to(self.power), targets.flatten(0, 1).to(self.power)
        self.power += rows.mT @ rows
        self.cross += rows.mT @ goals


def solve_held_out(first: NormalEquations, second: NormalEquations) -> Tensor:
    """V (S,d) of the ridge regression on both halves, lambda chosen by fitting one half and
    measuring the error on the other, both ways.
    """
    halves = [
        (half.power.to("cpu", torch.float64), half.cross.to("cpu", torch.float64)) for half in (first, second)
    ]
    power, cross = (a + b for a, b in zip(*halves, strict=True))
    scale = power.diagonal().sqrt()
    scale = scale.clamp_min(WEAKEST * float(scale.max())).clamp_min(torch.finfo(scale.dtype).tiny)
    (power1, cross1), (power2, cross2), (power, cross) = (
        (p / (scale[:, None] * scale), c / scale[:, None]) for p, c in (*halves, (power, cross))
    )
    gains = torch.zeros(len(LAMBDAS), dtype=torch.float64)  # over V = 0, on the inputs not fitted
    for fitted, fitted_cross, held_out, held_out_cross in (
        (power1, cross1, power2, cross2),
        (power2, cross2, power1, cross1),
    ):
        values, vectors = torch.linalg.eigh(fitted)
        rotated, rotated_cross = vectors.mT @ held_out @ vectors, vectors.mT @ held_out_cross
        for index, ridge in enumerate(LAMBDAS):
            solution = (vectors.mT @ fitted_cross) / (values.clamp_min(0) + ridge / 2)[:, None]
            gains[index] += (solution * (2 * rotated_cross - rotated @ solution)).sum()
    best = float(gains.max())
    if not best > 0:
        return torch.zeros_like(cross)
    strongest = int((gains >= GAIN_KEPT * best).nonzero().max())
    identity = torch.eye(len(power), dtype=power.dtype)
    return torch.linalg.solve(power + LAMBDAS[strongest] * identity, cross) / scale[:, None]
