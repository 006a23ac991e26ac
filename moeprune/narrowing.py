"""What stands in for dropped experts, in few directions of the output: thin products in place of wide ones.

What a fitted compensation adds is Z·V, with the regressors Z (combine weights, and for `affine` the layer's
input, the mean of its tokens, and 1; see moeprune.contributions). Of all matrices of rank r the one nearest
to it is Z·V·Bᵀ·B, where the rows of B are the first r eigenvectors of VᵀZᵀZ·V (Eckart and Young 1936), and
the eigenvalues are the energy that each direction holds. So V·Bᵀ (q,r) and B (r,o) are stored.

Axes: n experts, p slots per expert, d width of the input, o of the output, q regressors, r directions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeprune.flops import soft_moe_flops
from moeprune.plan import LayerPlan
from moeprune.soft_moe import SoftMoE


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
        cost, in_full = (soft_moe_flops(layer.config, tokens, p).compensation for p in (plan, layer.plan))
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
    n, p, _ = layer.slot_shape
    tensors = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    narrow = {"surrogate": factor[: n * p].unflatten(0, (n, p)), "basis": basis}
    if plan.has_affine:
        token, mean, bias = factor[n * p :].split([layer.config.dim, layer.config.dim, 1])
        narrow |= {"affine_token": token, "affine_mean": mean, "affine_bias": bias[0]}
    tensors |= {name: tensor.to(layer.surrogate).contiguous() for name, tensor in narrow.items()}
    if plan.scope != "static" and plan.signal != "combine":
        tensors["score_weights"] = layer.score_weights
    with torch.device("meta"):
        result = SoftMoE(layer.config, plan)
    result.load_state_dict(tensors, assign=True)
    return result.requires_grad_(False).eval()
