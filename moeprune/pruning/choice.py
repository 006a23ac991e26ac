"""Which experts a plan keeps, by its signal."""

from __future__ import annotations

from torch import Tensor

from moeprune.calibration.selection import best_kept
from moeprune.calibration.statistics import LayerMoments, LayerStatistics
from moeprune.calibration.sums import lost_gram
from moeprune.layers.merging import nearest_kept
from moeprune.layers.scores import random_scores, top_k
from moeprune.plan import LayerPlan
from moeprune.pruning.compensation import Gathered


def choose_experts(
    plan: LayerPlan, moments: LayerMoments | None, gathered: Gathered | None, seed: int, layer_index: int
) -> LayerPlan:
    """Return the plan with its static set, and what is merged, chosen.

    Args:
        plan: may leave them open.
        moments: of the layer, if calibrated.
        gathered: sums for a fitted compensation, if there is one.
        seed: of the signal `random`.
        layer_index: the layer's place among the planned ones.
    """
    if plan.scope == "static" and plan.kept is None:
        plan = plan.replace(kept=_best_experts(plan, moments, gathered, seed, layer_index))
    if plan.merges and plan.merged_into is None:
        assert gathered is not None
        assert plan.kept is not None
        power = gathered.halves[0].power + gathered.halves[1].power
        plan = plan.replace(merged_into=nearest_kept(power, plan.kept, plan.num_experts))
    return plan


def _best_experts(
    plan: LayerPlan, moments: LayerMoments | None, gathered: Gathered | None, seed: int, layer_index: int
) -> tuple[int, ...]:
    """Return the experts that a static set keeps, ascending."""
    n = plan.num_experts
    if plan.signal == "random":
        return tuple(top_k(random_scores(n, seed, layer_index), plan.k).tolist())
    assert moments is not None
    if plan.signal == "gram":
        if gathered is not None:
            gram = lost_gram(*gathered.halves, moments.term_mean, plan.compensation)
            return best_kept(gram, n, plan.k)
        assert isinstance(moments, LayerStatistics)
        return moments.best_kept(plan.k, plan.compensation)
    scores = moments.mean_mass
    if plan.signal == "deviation":
        scores = scores * moments.deviation
    return tuple(top_k(scores, plan.k).tolist())


def score_weights(
    plan: LayerPlan, moments: LayerMoments | None, seed: int, layer_index: int
) -> Tensor | None:
    """Return the factors of each expert's mass, or the scores, of a routed plan's signal (n), if any."""
    if plan.scope == "static" or plan.signal == "combine":
        return None
    if plan.signal == "random":
        return random_scores(plan.num_experts, seed, layer_index)
    assert moments is not None
    return moments.deviation
