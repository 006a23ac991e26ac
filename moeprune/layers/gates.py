"""From router logits to chosen experts and their gates.

Axes: t tokens, n experts that the router knows, k of them chosen for each token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.layers.gated_config import GatedMoEConfig


class Routing(NamedTuple):
    """The experts of each token, and their gates in float32 or better."""

    chosen: Tensor  # (t,k)
    gates: Tensor  # (t,k)


class Order(NamedTuple):
    """The order of the router's rows, where it is not that of the unpruned layer's experts."""

    rows: Tensor  # by expert (n)
    experts: Tensor  # by row (n)


def route(config: GatedMoEConfig, logits: Tensor, selection_bias: Tensor | None, order: Order | None) -> Routing:
    """Return what the router chooses by its logits (t,n), with a selection bias (n) if the configuration has one.

    order: of the rows, to choose within groups; None: that of the experts.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    k = min(config.top_k, logits.shape[1])
    if config.gates == "sparsemixer":
        return _sparsemixer(logits, k, config.jitter, config.gate_scale)
    is_softmax, limits = config.gates == "softmax", config.groups_kept < config.groups
    if is_softmax and not (config.selection_bias or limits):  # gates are in the order of the logits
        chosen = _best(logits, k)
        taken = logits.gather(1, chosen)
        gates = taken.softmax(1) if config.normalized else (taken - logits.logsumexp(1, keepdim=True)).exp()
        return Routing(chosen, _scaled(gates, config.gate_scale))
    all_gates = logits.softmax(1) if is_softmax else logits.sigmoid()
    scores = all_gates if selection_bias is None else all_gates + selection_bias
    chosen = _best(_within_groups(scores, config, order) if limits else scores, k)
    gates = all_gates.gather(1, chosen)
    if config.normalized:
        gates = gates / gates.sum(1, keepdim=True).clamp_min(1e-20)
    return Routing(chosen, _scaled(gates, config.gate_scale))


def _scaled(gates: Tensor, scale: float) -> Tensor:
    return gates if scale == 1 else gates * scale


def _best(scores: Tensor, k: int) -> Tensor:
    """Return the k best of each token (t,k); all in their order if there are no more."""
    if k == scores.shape[1]:
        return torch.arange(k, device=scores.device).expand_as(scores)
    return scores.topk(k, dim=1, sorted=False).indices


def _within_groups(scores: Tensor, config: GatedMoEConfig, order: Order | None) -> Tensor:
    """Return the scores (t,n), lowest for experts that are not in the best groups of their token."""
    in_groups = (scores if order is None else scores[:, order.rows]).unflatten(1, (config.groups, -1))
    of_groups = in_groups.amax(2) if config.group_score == "max" else in_groups.topk(2, dim=2).values.sum(2)
    best = of_groups.topk(config.groups_kept, dim=1, sorted=False).indices
    is_left_out = torch.ones_like(of_groups).scatter(1, best, 0)[:, :, None] > 0
    limited = in_groups.masked_fill(is_left_out, -torch.inf).flatten(1)
    return limited if order is None else limited[:, order.experts]


def _sparsemixer(logits: Tensor, k: int, jitter: float, scale: float) -> Routing:
    """Return the best experts one after the other, each gated among those within twice the jitter of it."""
    left, chosen, gates = logits, [], []
    for _ in range(k):
        best, index = left.max(1, keepdim=True)
        is_far = (best - logits) / logits.abs().clamp_min(best) > 2 * jitter
        gates.append(left.masked_fill(is_far, -torch.inf).softmax(1).gather(1, index))
        chosen.append(index)
        left = left.scatter(1, index, -torch.inf)
    return Routing(torch.cat(chosen, 1), _scaled(torch.cat(gates, 1), scale))
