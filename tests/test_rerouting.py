"""Tokens of a cut router choose others: which experts are kept, beside trials of pruned layers in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import moeprune
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.plan import LayerPlan
from moeprune.pruning.rerouting import drop_order
from tests.test_gated_calibration import CPU, FACTORY, build

N, KEPT, NAME = 8, 3, "module.moe.0"
KINDS: dict[str, dict[str, Any]] = {
    "softmax of the chosen": {"normalized": True},
    "softmax of all": {},
    "softmax with a bias": {"selection_bias": True},
    "sigmoid": {"gates": "sigmoid"},
    "normalised sigmoid with a bias": {"gates": "sigmoid", "normalized": True, "selection_bias": True},
    "sparsemixer": {"gates": "sparsemixer", "experts_per_token": 2},
    "dense": {"experts_per_token": None},
}


def dropped_by_trials(layer: GatedMoE, x: Tensor) -> list[int]:
    """Prune the layer anew for each expert that might be dropped next."""
    expected, left, order = layer(x), list(range(N)), list[int]()
    while len(left) > KEPT:
        errors = {}
        for j in left:
            kept = tuple(expert for expert in left if expert != j)
            plan = LayerPlan("static", len(kept), N, "gram", "renorm", kept)
            errors[j] = float((prune_layer(layer, plan, Calibrated(None))(x) - expected).square().sum())
        order.append(min(errors, key=lambda j: errors[j]))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("kind", KINDS)
def test_drops_what_changes_the_output_least(kind: str) -> None:
    torch.manual_seed(0)
    layer = GatedMoE(GatedMoEConfig(10, N, 6, **{"experts_per_token": 3, **KINDS[kind]}))
    layer = layer.requires_grad_(False).double()
    layer.router_weight.mul_(3)
    if layer.selection_bias is not None:
        layer.selection_bias.normal_(std=0.1)
    x = torch.randn(60, 10, dtype=torch.float64)
    outputs = layer.outputs_of_all(x, torch.eye(10))
    assert drop_order(layer, layer.logits(x), outputs, KEPT) == dropped_by_trials(layer, x)


def test_prune_keeps_them() -> None:
    inputs = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    full = moeprune.adopt(build(), (1, 4, 4), FACTORY)
    pruned = moeprune.prune(full, data=inputs, keep=KEPT, compensate="renorm", runtime=CPU)
    net = build().double().requires_grad_(False)
    x = net.embed(inputs.double().flatten(1).unflatten(1, (-1, 4))).flatten(0, 1)
    dropped = dropped_by_trials(net.moe[0], x)
    assert sorted({*range(N)} - {*dropped}) == [*pruned.plan[NAME].kept]
    one_shot = moeprune.prune(full, moeprune.analyze(full, inputs, runtime=CPU), keep=KEPT, compensate="renorm",
                              one_shot=True)  # fmt: skip
    assert len(one_shot.plan[NAME].kept) == KEPT


def test_an_analysis_alone_does_not_hinder_it(tmp_path: Any) -> None:
    inputs = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    full = moeprune.adopt(build(), (1, 4, 4), FACTORY)
    analysis = moeprune.analyze(full, inputs, runtime=CPU)
    plans = [
        moeprune.prune(full, given, data=inputs, keep=KEPT, compensate="renorm", runtime=CPU).plan
        for given in (None, analysis)
    ]
    assert plans[0] == plans[1]
