"""Give a fitted compensation in few directions of the output: thin products in place of wide ones.

A fitted compensation adds Z·V, with the regressors Z. Of all matrices of rank r the nearest to it is
Z·V·Bᵀ·B, where the rows of B are the first r eigenvectors of VᵀZᵀZ·V (Eckart and Young 1936); the eigenvalues
are the energies of the directions. V·Bᵀ (q,r) and B (r,o) are stored.

Axes: o width of the output, q regressors, r directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.layers.families import layer_of_tensors
from moeprune.layers.layer import MoELayer
from moeprune.plan import LayerPlan


def narrowed(layer: MoELayer, wanted: LayerPlan, power: Tensor, tokens: int) -> MoELayer:
    """Return the layer with its compensation in the directions that a plan's rank or energy asks for.

    With an energy, these are the fewest that hold it; where their products are no cheaper than the one they
    replace, the layer is returned as it is.

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
