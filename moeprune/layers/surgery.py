"""The one surgery: from a dense layer's tensors to those of a pruned layer, in memory or from file to file.

`merge` is MC-SMoE (Li et al. 2024, arXiv 2310.01334), to compare with leaving experts out. A dropped expert goes to the
kept one with the most similar weights over calibration data (cosine). Its hidden units are matched to the kept one's
(the assignment with the largest sum of products of weights; Ainsworth et al. 2023, arXiv 2209.04836, section 3.2). Then
a group becomes its mean, weighted by mass. The router and all terms stay, run by the merged expert of their group: the
file shrinks, the FLOPs do not.

Axes: n experts, p terms per expert, h hidden width, o width of the output.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moeprune.layers.experts import Experts
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer
from moeprune.plan import LayerPlan

T = TypeVar("T")


class FewerUnits(NamedTuple):
    """Kept experts that have lost hidden units.

    tensors: of the experts, by name. overfitting: by how much the squared error of what is fitted to one half of the
    inputs is larger on the other half, summed over experts.
    """

    tensors: dict[str, Tensor]
    overfitting: float


class Calibrated(NamedTuple):
    """Calibrated values of a layer; None if the plan does not need them."""

    score_weights: Tensor | None = None  # of a routed plan: factors of each mass, or scores (`random`) (n)
    term_mean: Tensor | None = None  # mean output of each term (n,p,o)
    mean_mass: Tensor | None = None  # of each expert (n)
    fewer_units: FewerUnits | None = None  # with a width


def prune_tensors(
    config: LayerConfig,
    plan: LayerPlan,
    take: Callable[[str, int | None, Sequence[int]], T],
    like: Tensor,
    calibrated: Calibrated = Calibrated(),
) -> dict[str, T | Tensor]:
    """Return the tensors of a pruned layer by name; a fitted compensation starts as `mean`.

    take: returns a tensor of the dense layer by name, all of it (axis None) or the places of some experts
    along an axis, in their order. like: has the type and the device of the compensation.
    """
    tensors: dict[str, T | Tensor] = {}
    is_static = plan.scope == "static"
    for name, shape in config.shapes(plan).items():
        if config.part(name) == "compensation":
            tensors[name] = like.new_zeros(shape)
        elif name == "score_weights":
            assert calibrated.score_weights is not None
            tensors[name] = calibrated.score_weights.to(like.device, torch.float32)
        else:
            is_expert = config.part(name) == "experts"
            axis = 0 if is_expert else config.router_axis(name)
            tensors[name] = take(name, axis if is_static else None, plan.kept or () if is_expert else plan.columns)
    if plan.has_surrogate:
        assert calibrated.term_mean is not None
        surrogate = calibrated.term_mean.to(like, copy=True)
        if is_static:  # in the order of the columns; kept experts have their own outputs
            surrogate = surrogate[list(plan.columns)]
            surrogate[: plan.k] = 0
        tensors["surrogate"] = surrogate
    return tensors


def prune_layer(layer: MoELayer, plan: LayerPlan, calibrated: Calibrated = Calibrated()) -> MoELayer:
    """Return a layer that follows the plan, made of a dense one."""
    dense = {name: tensor.detach() for name, tensor in layer.load().named_parameters()}
    like = layer.fc2_weight.detach()

    def take(name: str, axis: int | None, experts: Sequence[int]) -> Tensor:
        if axis is None:
            return dense[name]
        index = torch.tensor(experts, dtype=torch.int64, device=like.device)
        return dense[name][index] if axis == 0 else dense[name].index_select(axis, index)  # in the same memory format

    tensors = prune_tensors(layer.config, plan, take, like, calibrated)
    if plan.merges:
        assert calibrated.mean_mass is not None
        tensors |= merged_experts(dense, plan, calibrated.mean_mass, layer.config.alternates_gates)
    if plan.width is not None:
        assert calibrated.fewer_units is not None
        tensors |= calibrated.fewer_units.tensors
    return layer.with_plan(plan, tensors)


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


def merged_experts(
    tensors: Mapping[str, Tensor], plan: LayerPlan, mean_mass: Tensor, alternates: bool
) -> dict[str, Tensor]:
    """Return the tensors of the k kept experts, each merged with those that the plan folds into it.

    tensors: of all experts, by the names in Experts. mean_mass: the weights of the means (n). alternates: columns of
    gates and values do.
    """
    merged: dict[str, list[Tensor]] = {name: [] for name in Experts._fields if name in tensors}
    for group in plan.groups:
        kept, *others = ({name: tensors[name][j].to("cpu", torch.float64) for name in merged} for j in group)
        aligned = [kept, *(_aligned(other, kept, alternates) for other in others)]
        mass = mean_mass[group].double().clamp_min(torch.finfo(torch.float32).tiny)
        for name, means in merged.items():
            parts = torch.stack([expert[name] for expert in aligned])
            means.append(torch.tensordot(mass / mass.sum(), parts, dims=1))
    return {name: torch.stack(means).to(tensors[name]) for name, means in merged.items()}


def _aligned(expert: dict[str, Tensor], reference: dict[str, Tensor], alternates: bool) -> dict[str, Tensor]:
    """Return the expert with its hidden units reordered to match the reference's."""
    from scipy.optimize import linear_sum_assignment

    if "fc1_weight" not in expert:
        return expert  # one linear: what it takes is the layer's own
    likeness = _units(reference, alternates) @ _units(expert, alternates).mT
    order = torch.from_numpy(linear_sum_assignment(likeness.numpy(), maximize=True)[1])
    columns = _columns(order, expert, alternates)
    reordered = {name: expert[name][..., columns] for name in ("fc1_weight", "fc1_bias") if name in expert}
    return expert | reordered | {"fc2_weight": expert["fc2_weight"][:, order]}


def _columns(units: Tensor, expert: dict[str, Tensor], alternates: bool) -> Tensor:
    """Return the columns of an expert's first linear that belong to hidden units (h), gates and values together."""
    h = expert["fc2_weight"].shape[1]
    if expert["fc1_weight"].shape[1] == h:
        return units
    return torch.stack([2 * units, 2 * units + 1], 1).flatten() if alternates else torch.cat([units, units + h])


def _units(expert: dict[str, Tensor], alternates: bool) -> Tensor:
    """All weights of each hidden unit of an expert (h,…), those of its gate among them."""
    h, first = expert["fc2_weight"].shape[1], expert["fc1_weight"]
    if "fc1_bias" in expert:
        first = torch.cat([first, expert["fc1_bias"][None]])
    parts = [first[:, ::2], first[:, 1::2]] if alternates else first.split(h, dim=1)
    return torch.cat([*parts, expert["fc2_weight"]]).mT
