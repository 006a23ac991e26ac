"""Narrower experts: hidden units dropped by optimal brain surgeon, second linears refitted.

With A = Σ z·zᵀ of what an expert's second linear W (o,h) takes, weighted as in its output and, where it has a bias,
centred, the change Δ of W adds the error tr Δ·A·Δᵀ. With H = A + λ·1 and K = H⁻¹ of the units that are left, the best
change of their weights makes up for unit q but for |W_q|² / K_qq; the unit with the least is dropped, again and again
(Hassibi and Stork 1993, "Second order derivatives for network pruning", with all outputs of a unit at once):

    W ← W - W_q·K_q / K_qq      K ← K - K_qᵀ·K_q / K_qq

At last W' of the units S that are left, of all D, is solved for at once, W'_S = W_S + W_D·A_DS·H_SS⁻¹: ridge regression
of the expert's own output, towards its own weights. The bias takes up what is lost on average. λ, in units of the mean
diagonal of A, is the same for all experts, chosen by the error on held-out inputs.

Axes: e experts, h hidden width of an expert, u hidden units that are left, o width of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.calibration.units import UnitMoments, measure_units
from moeprune.calibration.walk import Stage
from moeprune.errors import MoepruneError
from moeprune.layers.experts import Experts
from moeprune.layers.surgery import FewerUnits, prune_layer
from moeprune.plan import Compensation, LayerPlan

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD = 512 << 20  # bytes of moments at once
CHOOSING = 8  # experts, spread evenly, by which the ridge is chosen


def fewer_units(stage: Stage, plan: LayerPlan) -> FewerUnits:
    """Return the kept experts of a stage with as many hidden units as a plan's width says.

    What they take is weighted as the router of the pruned layer does. Plans that keep the same experts under such a
    router, or all of them, share the result.
    """
    key = "units", plan.kept, plan.drops and plan.cuts_router, plan.width
    if key not in stage.shared:
        stage.shared[key] = _fewer_units(stage, plan)
    found: FewerUnits = stage.shared[key]
    return found


def _fewer_units(stage: Stage, plan: LayerPlan) -> FewerUnits:
    assert plan.width is not None
    layer = stage.layer
    if plan.drops:
        router: Compensation = "renorm" if plan.cuts_router else "none"
        layer = prune_layer(layer, LayerPlan("static", plan.k, plan.num_experts, plan.signal, router, plan.kept))
    dense = {name: tensor.detach() for name, tensor in layer.named_parameters() if name in Experts._fields}
    parts: dict[str, list[Tensor]] = {name: [] for name in dense}
    has_bias, overfitting = "fc2_bias" in dense, 0.0
    step = max(1, HELD // (2 * 8 * layer.fc2_weight.shape[2] ** 2))
    for start in range(0, plan.k, step):
        some = range(start, min(start + step, plan.k))
        halves, near = measure_units(stage, layer, some, near_means=has_bias)
        if not all(part.isfinite().all() for half in halves for part in half):
            raise MoepruneError(
                f"hidden units of layer `{stage.name}` cannot be chosen: numbers are NaN or infinite",
                "check the checkpoint, or use `--dtype float32`",
            )
        own = {name: tensor[some.start : some.stop] for name, tensor in dense.items()}
        weight = own["fc2_weight"].to(near)
        ridge, more = choose_ridge(halves, weight, plan.width, has_bias)
        overfitting += more
        both = halves[0] + halves[1]
        left, refitted = fit_units(both, weight, plan.width, ridge, has_bias)
        for name, tensor in own.items():
            if name.startswith("fc1"):
                parts[name].append(_units_of(tensor, left, weight.shape[2], layer.config.alternates_gates))
        parts["fc2_weight"].append(refitted.to(layer.fc2_weight))
        if has_bias:
            change = weight @ (near + both.mean)[:, :, None] - refitted @ (near + both.mean).gather(1, left)[:, :, None]
            parts["fc2_bias"].append((own["fc2_bias"].to(near) + change[:, :, 0]).to(layer.fc2_weight))
    return FewerUnits({name: torch.cat(tensors) for name, tensors in parts.items()}, overfitting)


def _units_of(tensor: Tensor, left: Tensor, hidden: int, alternates: bool) -> Tensor:
    """Return a tensor of first linears (e,…,h), or (e,…,2·h) with a gate, for the units (e,u) alone."""
    places = left
    if tensor.shape[-1] == 2 * hidden:
        both = torch.stack([2 * left, 2 * left + 1], 2) if alternates else torch.stack([left, left + hidden], 1)
        places = both.flatten(1)
    places = places.to(tensor.device)
    return tensor.gather(-1, places if tensor.ndim == 2 else places[:, None].expand(-1, tensor.shape[1], -1))


def choose_ridge(
    halves: tuple[UnitMoments, UnitMoments], weight: Tensor, width: int, has_bias: bool
) -> tuple[float, float]:
    """Return the ridge whose experts, fitted to one half, have the least error on the other, both ways; and by how much
    that is more than their error on the half that they are fitted to, for all experts.
    """
    count = len(weight)
    some = torch.linspace(0, count - 1, min(count, CHOOSING), device=weight.device).round().long()
    parts, weight, errors = [half.select(some) for half in halves], weight[some], []
    for ridge in RIDGES:
        error, of_fitted = 0.0, 0.0
        for fitted, held_out in (parts, parts[::-1]):
            left, refitted = fit_units(fitted, weight, width, ridge, has_bias)
            change = weight - torch.zeros_like(weight).scatter_(2, left[:, None].expand_as(refitted), refitted)
            centre = _centre(fitted, has_bias)
            for moments, is_held_out in ((held_out, True), (fitted, False)):
                found = float(((change @ moments.around(centre)) * change).sum())
                error, of_fitted = (error + found, of_fitted) if is_held_out else (error, of_fitted + found)
        errors.append((error, ridge, max(error - of_fitted, 0.0)))
    _, ridge, gap = min(errors)
    return ridge, gap * count / len(some)


def _centre(moments: UnitMoments, has_bias: bool) -> Tensor:
    """Return what a bias makes up for (e,h)."""
    return moments.mean if has_bias else torch.zeros_like(moments.sums)


def fit_units(moments: UnitMoments, weight: Tensor, width: int, ridge: float, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Return the hidden units that are left of each expert, ascending (e,u), and their refitted weights (e,o,u).

    weight: W (e,o,h), of the moments' type.
    """
    power = _scaled(moments.around(_centre(moments, has_bias)))
    left = units_left(power, weight, width, ridge)
    is_left = torch.zeros_like(power[:, 0], dtype=torch.bool).scatter_(1, left, True)
    rows = power.gather(1, left[:, :, None].expand(-1, -1, power.shape[2]))  # A_S (e,u,h)
    within = rows.gather(2, left[:, None].expand(-1, width, -1))
    within.diagonal(dim1=1, dim2=2).add_(ridge)
    lost = rows @ weight.mT.masked_fill(is_left[:, :, None], 0)  # A_SD·W_Dᵀ (e,u,o)
    more = torch.cholesky_solve(lost, torch.linalg.cholesky(within)).mT
    return left, weight.gather(2, left[:, None].expand(-1, weight.shape[1], -1)) + more


def _scaled(power: Tensor) -> Tensor:
    """Return second moments (e,h,h) with a mean diagonal of 1, and without what rounding has made negative."""
    mean = power.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > torch.finfo(power.dtype).tiny ** 0.5, mean, 1.0)  # rounding can make nothing negative
    values, vectors = torch.linalg.eigh(power / mean[:, None, None])
    return (vectors * values.clamp_min(0)[:, None]) @ vectors.mT


def units_left(power: Tensor, weight: Tensor, width: int, ridge: float) -> Tensor:
    """Return the hidden units of each expert that optimal brain surgeon leaves, ascending (e,u).

    power: A (e,h,h), positive. weight: W (e,o,h). ridge: λ. Of equal losses the first unit's is taken.
    """
    damped = power.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))  # K
    gram = weight.mT @ weight  # of the columns of W, all that its losses take
    hidden, every = power.shape[2], torch.arange(len(power), device=power.device)
    is_dropped = torch.zeros_like(power[:, 0], dtype=torch.bool)
    for _ in range(hidden - width):
        pivots = inverse.diagonal(dim1=1, dim2=2)
        losses = (gram.diagonal(dim1=1, dim2=2) / pivots).masked_fill(is_dropped, torch.inf)
        unit = losses.argmin(1)
        column, products = inverse[every, :, unit], gram[every, :, unit]  # (e,h)
        share = column / pivots[every, unit][:, None]
        own = products[every, unit][:, None]
        across = (products - own * share / 2)[:, :, None]  # (W - W_q·share)ᵀ(W - W_q·share) is the next Gram matrix
        gram.baddbmm_(across, share[:, None], alpha=-1).baddbmm_(share[:, :, None], across.mT, alpha=-1)
        inverse.baddbmm_(column[:, :, None], share[:, None], alpha=-1)
        is_dropped[every, unit] = True
    return (~is_dropped).nonzero()[:, 1].view(len(power), width)
