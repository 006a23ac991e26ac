"""What stands in for dropped experts, in few directions of the output: thin products in place of wide ones.

What a fitted compensation adds is Z·V, with the regressors Z (combine weights, and for `affine` the layer's
input, the mean of its tokens, and 1). Of all matrices of rank r the one nearest
to it is Z·V·Bᵀ·B, where the rows of B are the first r eigenvectors of VᵀZᵀZ·V (Eckart and Young 1936), and
the eigenvalues are the energy that each direction holds. So V·Bᵀ (q,r) and B (r,o) are stored.

Axes: n experts, p slots per expert, d width of the input, o of the output, q regressors, r directions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeprune.calibration.sums import added_tensors
from moeprune.layers.soft_moe import SoftMoE, layer_of_tensors
from moeprune.plan import LayerPlan


def narrowed(layer: SoftMoE, wanted: LayerPlan, power: Tensor, tokens: int) -> SoftMoE:
    """The layer with its compensation in the directions that a plan's rank or energy asks for.

    With an energy that is the fewest directions that hold it; where their products are no cheaper than the
    one they replace, the layer stays as it is.

    Args:
        layer: pruned, with a fitted compensation in full.
        wanted: has a rank or an energy.
        power: ZᵀZ (q,q), summed over calibration data, the slots in the order of phi's columns.
        tokens: of one input.
    """
    assert layer.plan is not None
    added = _added(layer)
    energies, directions = torch.linalg.eigh(added.mT @ power.to("cpu", torch.float64) @ added)
    rank = wanted.rank
    if rank is None:
        assert wanted.energy is not None
        held = energies.flip(0).clamp_min(0).cumsum(0)
        rank = int((held < wanted.energy * held[-1]).sum()) + 1
    plan = replace(layer.plan, rank=rank)
    if wanted.rank is None:
        cost, in_full = (layer.config.flops(tokens, p).compensation for p in (plan, layer.plan))
        if cost >= in_full:
            return layer
    basis = directions[:, -rank:].flip(1).mT  # (r,o)
    return _with_basis(layer, plan, added @ basis.mT, basis)


def _added(layer: SoftMoE) -> Tensor:
    """V (q,o) of a layer, in float64 on the CPU."""
    parts = [layer.surrogate.flatten(0, 1)]
    if layer.plan is not None and layer.plan.has_affine:
        parts += [layer.affine_token, layer.affine_mean, layer.affine_bias[None]]
    return torch.cat(parts).to("cpu", torch.float64)


def _with_basis(layer: SoftMoE, plan: LayerPlan, factor: Tensor, basis: Tensor) -> SoftMoE:
    """The layer with V·Bᵀ (q,r) and B (r,o) in place of V."""
    narrow = {**added_tensors(layer, factor), "basis": basis}
    tensors = {name: tensor.to(layer.surrogate).contiguous() for name, tensor in narrow.items()}
    return layer_of_tensors(layer.config, plan, {**layer.state_dict(), **tensors})
