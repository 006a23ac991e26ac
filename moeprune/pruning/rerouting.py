"""Which experts a layer keeps whose tokens choose others in place of dropped ones: by the error of its output.

A cut router gives each token the best of the kept experts, so that what is lost is not a sum over pairs of experts. The
expert whose loss adds the least error to the layer's output, on some tokens of the calibration data, is dropped, again
and again; Lu et al. 2024 (arXiv 2402.14800) try all sets of experts in place of this. A trial runs no expert: each has
given its output for all of these tokens before.

Axes: t tokens, n experts, a of them left, k chosen for a token, s directions of the output, r trials.
"""

import torch
from torch import Tensor

from moeprune.calibration.ridge import sketch
from moeprune.calibration.walk import Stage
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.gates import Routing

TOKENS = 4096  # that are looked at, drawn from all
DIRECTIONS = 128  # of the output
TRIALS = 2**22  # numbers in each of the temporary tensors of trials


def best_rerouted(stage: Stage, k: int) -> tuple[int, ...]:
    """Return the k experts to keep of a stage's layer, ascending, if its router is cut to them.

    Plans that drop more share the order in which experts are dropped.
    """
    layer = stage.layer
    assert isinstance(layer, GatedMoE)
    order: list[int] = stage.shared.get("rerouted", [])
    if len(order) < layer.config.num_experts - k:
        logits, outputs = _sampled(stage, layer)
        order = stage.shared["rerouted"] = drop_order(layer, logits, outputs, k)
    dropped = set(order[: layer.config.num_experts - k])
    return tuple(j for j in range(layer.config.num_experts) if j not in dropped)


def _sampled(stage: Stage, layer: GatedMoE) -> tuple[Tensor, Tensor]:
    """Return router logits (t,n) and the outputs of all experts (n,t,s) of some tokens."""
    directions = sketch(layer.config.output_width, DIRECTIONS).to(layer.fc2_weight.device)
    count = sum(halt.expected.shape[:-1].numel() for halt in stage.halts)
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(count))[:TOKENS].sort().values
    found, start = [], 0
    for _, seen, _ in stage.observe():
        tokens = seen.tokens.flatten(0, 1)
        is_drawn = torch.zeros(len(tokens), dtype=torch.bool)
        is_drawn[drawn[(drawn >= start) & (drawn < start + len(tokens))] - start] = True
        start += len(tokens)
        is_drawn = is_drawn.to(tokens.device)
        tokens = tokens[is_drawn if seen.mask is None else is_drawn & seen.mask.flatten()]
        found.append((layer.logits(tokens), layer.outputs_of_all(tokens, directions)))
    logits, outputs = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(outputs, 1)


def drop_order(layer: GatedMoE, logits: Tensor, outputs: Tensor, keep: int) -> list[int]:
    """Return the experts in the order in which they are dropped (n - keep).

    logits: of the full router (t,n), in float32 or better. outputs: of all experts (n,t,s).
    """
    left = list(range(len(outputs)))
    token = torch.arange(len(logits), device=logits.device)
    routing = layer.choose_by(logits)
    target = _combined(outputs, left, token, routing)
    order: list[int] = []
    while len(left) > keep:
        errors = _errors_of_trials(layer, logits[:, left], outputs, left, target)
        order.append(left.pop(int(errors.argmin())))
    return order


def _errors_of_trials(layer: GatedMoE, logits: Tensor, outputs: Tensor, left: list[int], target: Tensor) -> Tensor:
    """Return the squared error of the layer's output without each of the experts that are left (a)."""
    tokens, count, config = torch.arange(len(logits), device=logits.device), len(left), layer.config
    routing = layer.choose_by(logits, left)
    now, chosen = _combined(outputs, left, tokens, routing), routing.chosen
    # A token that has not chosen the dropped expert keeps its output, but for gates that are shares of all experts.
    scale = 1 / (1 - logits.softmax(1)).clamp_min(1e-6) if config.scales_others else torch.ones_like(logits)
    squares = [(part * other).sum(1, keepdim=True) for part, other in ((now, now), (now, target), (target, target))]
    errors = (scale.square() * squares[0] - 2 * scale * squares[1] + squares[2]).double()  # (t,a)
    if config.changes_others:
        chosen = torch.arange(count, device=logits.device).expand(len(logits), -1)
    rows, step = tokens.repeat_interleave(chosen.shape[1]), max(1, TRIALS // (count + config.top_k * target.shape[1]))
    for some, dropped in zip(rows.split(step), chosen.flatten().split(step), strict=True):
        trial = layer.choose_by(logits[some], left, dropped)
        missed = _combined(outputs, left, some, trial) - target[some]
        errors[some, dropped] = missed.square().sum(1).double()
    return errors.sum(0)


def _combined(outputs: Tensor, left: list[int], tokens: Tensor, routing: Routing) -> Tensor:
    """Return the layer's output (r,s) for some tokens (r), which choose among the experts that are left."""
    experts = torch.tensor(left, device=outputs.device)[routing.chosen]
    return (routing.gates.to(outputs)[:, None] @ outputs[experts, tokens[:, None]])[:, 0]
