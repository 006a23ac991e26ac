"""Fit what compensates for dropped experts: regressions on data, without labels.

A pruned layer that uses means gives Y' = sum over kept experts of R_j + sum over dropped ones of w_j·mu_j. It lacks
T = Y - Y', where Y is the output of the same layer in the unpruned model, so that T also holds what pruned layers
before it broke. Where the layer's output is added to a stream, as in a transformer, T also holds what they broke there:
it is what the stream behind the layer lacks. One regression of T on

    lstsq          the weights of all terms, without those that ran for their own input (a static set may correct
                   kept terms too: that costs nothing)
    affine         the same, the layer's input X, the mean of its tokens, and 1
    refit          the same, and what the kept experts' last linears take, times the experts' weights, which changes
                   these linears and costs nothing at inference
    renorm-refit   what the last linears take and their biases alone, with weights over kept experts; beyond
                   MAX_REGRESSORS expert by expert, where tokens choose experts
    linear         X, the mean of its tokens, and 1 alone: Y' = 0

is added to what the layer has, whose experts may have lost hidden units before (moeprune.pruning.width). With
`low-rank` and `low-rank-lstsq` dropped experts first become affine maps of their inputs s, fitted to their own outputs
f by reduced-rank regression (Izenman 1975) with the squares of their weights; `affine` or `lstsq` then fits what is
still lacking, where tokens choose experts with the last linears of few kept ones, too.

Axes: b inputs, m tokens, d width of the input, o of the output, n experts, e dropped ones, p terms per expert, q
regressors.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from moeprune.calibration.ridge import Fit, solve_held_out
from moeprune.calibration.sums import RegressionSums
from moeprune.calibration.walk import Stage
from moeprune.errors import MoepruneError
from moeprune.layers.interface import LayerConfig
from moeprune.layers.layer import MoELayer
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import FITTED, LOW_RANK, REFITS, LayerPlan, Plan
from moeprune.pruning.low_rank import fit_low_rank, set_maps
from moeprune.pruning.refit import refit_by_expert
from moeprune.pruning.results import FitQuality

MAX_REGRESSORS = 4096  # regressors that a refit takes at most: their Gram matrix is held in float64, and decomposed


def fit(stage: Stage, wanted: LayerPlan, calibrated: Calibrated, tokens: int) -> tuple[MoELayer, FitQuality]:
    """Return the pruned layer of a stage with its compensation fitted, and how well.

    wanted: its plan, which may have a rank or energy. tokens: of one input.
    """
    maps, beside = None, 0.0
    if wanted.is_low_rank:
        wanted, maps, beside = fit_low_rank(stage, wanted)
    plan = wanted if wanted.compensation in LOW_RANK else wanted.replace(rank=None, energy=None)
    layer = prune_layer(stage.layer, plan, calibrated)
    if maps is not None:
        set_maps(layer, maps)
    beside += calibrated.fewer_units.overfitting if calibrated.fewer_units is not None else 0.0
    kinds, left_out = layer.regressor_kinds() if plan.compensation in FITTED else {}, 0.0
    if layer.config.refits_by_expert and kinds.get("hidden", 0) > MAX_REGRESSORS:
        errors = refit_by_expert(stage, layer)
        require_fitted(stage.name, errors[1], layer.fc2_weight)
    else:
        found, power = regress(stage, layer, kinds)
        errors = found.fitted, found.held_out
        require_fitted(stage.name, found.held_out, found.solution)
        if kinds:
            correct(layer, found.solution)
        if wanted != plan:
            hidden = kinds.get("hidden", 0)
            layer, left_out = narrowed(layer, wanted, power[hidden:, hidden:], tokens)
    fitted, held_out = (max(error, 0.0) + left_out for error in errors)
    quality = FitQuality(
        samples=sum(len(halt.expected) for halt in stage.halts) // stage.layer.config.windows,
        rows=sum(halt.expected.shape[:-1].numel() for halt in stage.halts),
        regressors=sum(kinds.values()) + (plan.k * plan.width if plan.width is not None else 0),
        fitted_error=fitted / stage.power,
        held_out_error=(held_out + beside) / stage.power,
    )
    return layer, quality


def require_fitted(name: str, error: float, solution: Tensor) -> None:
    """Raise a MoepruneError if the error of a layer's fit, or its solution, is not finite."""
    if not (math.isfinite(error) and solution.isfinite().all()):
        raise MoepruneError(
            f"the compensation of layer `{name}` cannot be fitted: numbers are NaN or infinite",
            "check the analysis and the checkpoint, or use `--dtype float32`",
        )


def regress(stage: Stage, layer: MoELayer, kinds: Mapping[str, int] | None = None) -> tuple[Fit, Tensor]:
    """Fit what a pruned layer lacks; return the fit, with V (q,o), and ZᵀZ (q,q) of the regressors.

    kinds: numbers of the regressors; None: those of its compensation.
    """
    kinds, width, plan = layer.regressor_kinds() if kinds is None else kinds, layer.config.output_width, layer.plan
    assert plan is not None
    columns = *kinds.items(), plan.scope, plan.columns if plan.scope == "static" else plan  # decide the regressors
    is_shared = "hidden" not in kinds and "bias" not in kinds and not plan.is_low_rank  # whose columns are its own
    known = stage.shared.get(("power", columns)) if is_shared else None
    device, targets = layer.fc2_weight.device, 2 if stage.has_stream else 1
    halves = [RegressionSums(kinds, width, device, known and known[half], targets) for half in range(2)]
    for members, seen, gap in stage.observe(layer):
        wanted = (gap.whole, gap.own)[:targets]
        for which, index in enumerate(members):
            halves[which].add(seen.select(index), *(each[index] for each in wanted))
    if is_shared:
        stage.shared["power", columns] = [half.power for half in halves]
    of_tokens = sum(kinds.get(name, 0) for name in ("token", "mean", "one"))
    groups = [size for name, size in kinds.items() if name in ("hidden", "bias", "terms")]
    groups += [of_tokens] if of_tokens else []
    of_halves = [halves.pop(0).equations() for _ in range(2)]  # the sums of many regressors take much memory
    first, second = (equations[0] for equations in of_halves)
    own = (of_halves[0][1], of_halves[1][1]) if stage.has_stream else None
    return solve_held_out((first, second), [*kinds.values()], groups, own), first.power + second.power


def correct(layer: MoELayer, correction: Tensor) -> None:
    """Add V (q,o) to what a pruned layer's regressors are multiplied by, in place."""
    kinds = layer.regressor_kinds()
    own = [kinds.get("hidden", 0), kinds.get("bias", 0)]
    hidden, bias, rest = correction.split([*own, len(correction) - sum(own)])
    if len(hidden):
        change = hidden.unflatten(0, (len(layer.fc2_weight), -1)).mT
        layer.fc2_weight = torch.nn.Parameter(layer.fc2_weight + change.to(layer.fc2_weight), False)
    if len(bias):
        layer.fc2_bias = torch.nn.Parameter(layer.fc2_bias + bias.to(layer.fc2_weight), False)
    for name, rows in layer.split_rows(rest.to(layer.fc2_weight)).items():
        getattr(layer, name).add_(rows)


def too_large_refits(
    configs: Mapping[str, LayerConfig], plan: Plan, most: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the number of regressors of each layer whose refit would take more than MAX_REGRESSORS.

    most: other numbers by compensation.
    """
    found = {}
    for name, layer in plan.items():
        config, count = configs[name], layer.k * (layer.width or configs[name].expert_width)
        if not (layer.compensation in REFITS and layer.compensates) or config.refits_by_expert:
            continue
        if layer.compensation == "renorm-refit" and "fc2_bias" in config.expert_shapes(1):
            count += layer.k
        if layer.compensation == "refit":
            count += config.num_experts * config.terms_per_expert + 2 * config.dim + 1
        if count > (most or {}).get(layer.compensation, MAX_REGRESSORS):
            found[name] = count
    return found


def narrowed(layer: MoELayer, wanted: LayerPlan, power: Tensor, tokens: int) -> tuple[MoELayer, float]:
    """Return the layer with its compensation in the output directions that a plan's rank or energy asks for, and the
    energy of the others.

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
    rank = None if wanted.rank is None else int(wanted.rank)
    if rank is None:
        assert wanted.energy is not None
        held = energies.flip(0).clamp_min(0).cumsum(0)
        rank = int((held < wanted.energy * held[-1]).sum()) + 1
    plan = layer.plan.replace(rank=rank)
    cost, in_full = (layer.config.flops(tokens, each).compensation for each in (plan, layer.plan))
    if wanted.rank is None and cost >= in_full:
        return layer, 0.0
    basis = directions[:, -rank:].flip(1).mT  # (r,o)
    narrow = {**layer.split_rows(added @ basis.mT), "basis": basis}
    tensors = {name: tensor.to(layer.surrogate).contiguous() for name, tensor in narrow.items()}
    left_out = float(energies[: len(energies) - rank].clamp_min(0).sum())
    return layer.with_plan(plan, {**layer.state_dict(), **tensors}), left_out
