"""Fold dropped experts into kept ones, to compare with leaving them out.

MC-SMoE (Li et al. 2024, arXiv 2310.01334), adapted to Soft MoE. A dropped expert goes to the kept one with
the most similar combine weights over calibration data (cosine). Its hidden units are matched to the kept
one's (the assignment with the largest sum of products of weights; Ainsworth et al. 2023, arXiv 2209.04836,
section 3.2). Then a group becomes its mean, weighted by mass. All slots stay, run by the merged expert of
their group: the file shrinks, the FLOPs do not.

Axes: n experts, p slots per expert, d width of the input, h hidden width, o width of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeprune.layers.experts import Experts
from moeprune.plan import LayerPlan


def nearest_kept(power: Tensor, kept: Sequence[int], num_experts: int) -> tuple[int, ...]:
    """Return for each dropped expert, ascending, the kept one with the most similar weights.

    power: CᵀC (n·p,n·p), summed over calibration data. kept: at least one expert, ascending.
    """
    n = num_experts
    together = power.unflatten(1, (n, -1)).unflatten(0, (n, -1)).sum((1, 3)).cpu()
    length = together.diagonal().sqrt().clamp_min(torch.finfo(together.dtype).tiny ** 0.25)
    likeness = together / length / length[:, None]
    dropped = sorted(set(range(n)) - set(kept))
    return tuple(kept[place] for place in likeness[dropped][:, list(kept)].argmax(1).tolist())


def merged_experts(tensors: Mapping[str, Tensor], plan: LayerPlan, mean_mass: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the k kept experts, each merged with those that the plan folds into it.

    tensors: of all experts, by the names in Experts. mean_mass: the weights of the means (n).
    """
    experts = Experts(*(tensors.get(name) for name in Experts._fields))  # type: ignore[arg-type]
    merged = [_mean([_one(experts, j) for j in group], mean_mass[group]) for group in plan.groups]
    columns = zip(Experts._fields, zip(*merged, strict=True), experts, strict=True)
    return {name: torch.stack(parts).to(like) for name, parts, like in columns if like is not None}


def _one(experts: Experts, index: int) -> Experts:
    """One of the experts, in float64 on the CPU."""
    parts = (None if part is None else part[index].detach().to("cpu", torch.float64) for part in experts)
    return Experts(*parts)  # type: ignore[arg-type]


def _mean(group: Sequence[Experts], mass: Tensor) -> Experts:
    """The mean of experts by their mass, with the hidden units in the order of the first one's."""
    aligned = [group[0], *(_aligned(expert, group[0]) for expert in group[1:])]
    mass = mass.double().clamp_min(torch.finfo(torch.float32).tiny)
    weights = mass / mass.sum()
    means = (
        None if parts[0] is None else torch.tensordot(weights, torch.stack(parts), dims=1)
        for parts in zip(*aligned, strict=True)
    )
    return Experts(*means)  # type: ignore[arg-type]


def _aligned(expert: Experts, reference: Experts) -> Experts:
    """Return the expert with its hidden units reordered to match the reference's."""
    from scipy.optimize import linear_sum_assignment

    if expert.fc1_weight is None or expert.fc1_bias is None:
        return expert  # one linear: what it takes is the layer's own
    likeness = _units(reference) @ _units(expert).mT
    order = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
    h = len(order)
    rows = torch.cat([order, order + h]) if expert.fc1_bias.shape[0] == 2 * h else order
    return Experts(expert.fc1_weight[:, rows], expert.fc1_bias[rows], expert.fc2_weight[:, order], expert.fc2_bias)


def _units(expert: Experts) -> Tensor:
    """All weights of each hidden unit of an expert (h,…), those of its gate among them."""
    assert expert.fc1_weight is not None
    assert expert.fc1_bias is not None
    h = expert.fc2_weight.shape[1]
    first = torch.cat([expert.fc1_weight, expert.fc1_bias[None]]).split(h, dim=1)
    return torch.cat([*first, expert.fc2_weight]).mT
