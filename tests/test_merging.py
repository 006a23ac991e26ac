"""Merged experts, against the formulas with brute-force alignment, and on the command line."""

from itertools import permutations

import numpy as np
import pytest
import torch

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, nearest_kept, prune_layer
from moeprune.plan import LayerPlan
from tests.reference import reference_layer

CPU = moeprune.Runtime("cpu", batch_size=64)
KINDS = ("mlp", "geglu", "linear")
D, N, P, H = 6, 5, 2, 4


def dense_layer(kind: str, seed: int = 0) -> SoftMoE:
    config = SoftMoEConfig(D, N, P, None if kind == "linear" else H, expert=kind)
    layer = SoftMoE(config).double().requires_grad_(False).eval()
    layer.reset_parameters(torch.Generator().manual_seed(seed), scale=4.0)
    return layer


def merge_plan(kept, merged_into) -> LayerPlan:
    return LayerPlan("static", len(kept), N, "combine", "merge", tuple(kept), merged_into=tuple(merged_into))


def reordered(layer: SoftMoE, of: int, order: list[int]) -> dict[str, torch.Tensor]:
    """The tensors of an expert with its hidden units in another order."""
    tensors = {name: tensor[of].clone() for name, tensor in layer.named_parameters() if name.startswith("fc")}
    if "fc1_weight" in tensors:
        columns = order if layer.fc1_bias.shape[1] == H else [*order, *(H + i for i in order)]
        tensors["fc1_weight"] = tensors["fc1_weight"][:, columns]
        tensors["fc1_bias"] = tensors["fc1_bias"][columns]
        tensors["fc2_weight"] = tensors["fc2_weight"][:, order]
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_differ_in_the_order_of_hidden_units_alone_merge_without_loss(kind):
    layer = dense_layer(kind)
    order = [2, 0, 3, 1] if kind != "linear" else list(range(D))
    for name, tensor in reordered(layer, 1, order).items():
        getattr(layer, name)[3] = tensor
    merged = prune_layer(layer, merge_plan((0, 1, 2, 4), (1,)), Calibrated(mean_mass=torch.rand(N)))
    x = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (merged(x) - layer(x)).abs().max() < 1e-12
    assert merged.fc2_weight.shape[0] == 4


def best_order(layer: SoftMoE, reference: int, of: int) -> list[int]:
    """By trying every order of the hidden units."""

    def likeness(order) -> float:
        other = reordered(layer, of, list(order))
        names = ("fc1_weight", "fc1_bias", "fc2_weight")
        return sum(float((getattr(layer, name)[reference] * other[name]).sum()) for name in names)

    return list(max(permutations(range(H)), key=likeness))


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_runs_by_the_mean_of_its_group(kind):
    layer = dense_layer(kind, seed=3)
    mass = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.3])
    merged = prune_layer(layer, merge_plan((1, 2), (2, 1, 2)), Calibrated(mean_mass=mass))
    tensors = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    for group in ((1, 3), (2, 0, 4)):
        parts = []
        for j in group:
            order = best_order(layer, group[0], j) if kind != "linear" else list(range(D))
            parts.append(reordered(layer, j, order))
        total = sum(float(mass[j]) for j in group)
        for name in parts[0]:
            mean = sum(float(mass[j]) / total * part[name] for j, part in zip(group, parts, strict=True))
            for j in group:
                tensors[name][j] = mean
    x = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = reference_layer(x, tensors, layer.config.router_norm, layer.config.dispatch_input)
    assert (merged(x) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("columns", ["first", "even"])
def test_token_gated_experts_merge_too(columns):
    layer = GatedMoE(GatedMoEConfig(D, N, H, 2, normalized=True, gate_columns=columns)).double()
    layer.requires_grad_(False).router_weight.mul_(4)
    order = torch.tensor([2, 0, 3, 1])
    both = torch.stack([2 * order, 2 * order + 1], 1).flatten() if columns == "even" else torch.cat([order, order + H])
    layer.fc1_weight[3], layer.fc2_weight[3] = layer.fc1_weight[1][:, both], layer.fc2_weight[1][:, order]
    x = torch.randn(3, 7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = prune_layer(layer, merge_plan((0, 1, 2, 4), (1,)), Calibrated(mean_mass=torch.rand(N)))
    assert (same(x) - layer(x)).abs().max() < 1e-12
    mass = torch.tensor([0.3, 0.1, 0.25, 0.05, 0.3])
    merged = prune_layer(layer, merge_plan((1, 2), (2, 1, 2)), Calibrated(mean_mass=mass))
    for place, group in enumerate(((1, 3), (2, 0, 4))):
        for j in group:
            layer.fc1_weight[j], layer.fc2_weight[j] = merged.fc1_weight[place], merged.fc2_weight[place]
    assert (merged(x) - layer(x)).abs().max() < 1e-12
    seen = []
    merged.observer = seen.append
    assert (merged(x) - layer(x)).abs().max() < 1e-12  # the way that shows rows
    assert torch.allclose(seen[0].weights.sum((2, 3)), torch.ones(3, 7, dtype=torch.float64))


def test_each_dropped_expert_goes_to_the_kept_one_that_is_weighted_most_alike():
    weights = np.random.default_rng(0).random((200, N, P))
    flat = weights.reshape(200, N * P)
    found = nearest_kept(torch.from_numpy(flat.T @ flat), (0, 3), N)
    of_expert = weights.sum(2).T  # (n,200)

    def cosine(i: int, j: int) -> float:
        return of_expert[i] @ of_expert[j] / np.linalg.norm(of_expert[i]) / np.linalg.norm(of_expert[j])

    assert found == tuple(max((0, 3), key=lambda i, j=j: cosine(i, j)) for j in (1, 2, 4))


def test_merging_on_the_command_line(vit, vit_analysis, run, run_json, tmp_path):
    path, again = tmp_path / "merged.safetensors", tmp_path / "again.safetensors"
    call = f"prune {vit} --analysis {vit_analysis}"
    found = run_json(f"{call} --keep 1/2 --compensate merge -o {path} --save-plan {tmp_path}/plan.json")
    for layer in found["plan"].values():
        assert len(layer["merged_into"]) == 32
        assert set(layer["merged_into"]) <= set(layer["kept"])
    assert found["model"]["bytes"] < 0.7 * found["full_model"]["bytes"]
    assert found["model"]["flops_per_input"] == found["full_model"]["flops_per_input"]
    run_json(f"{call} --plan {tmp_path}/plan.json -o {again}")
    assert again.read_bytes() == path.read_bytes()
    evaluated = run_json(f"eval {path} --data pairs --limit 200 --baseline {vit}")
    assert evaluated["difference"]["agreement"] > 0.5
    for name, layer in moeprune.load(path).moe_layers.items():
        assert layer.fc1_weight.shape[0] == 32
        assert list(layer.plan.merged_into) == found["plan"][name]["merged_into"]
    assert "32 of 64 by combine, merge" in run("inspect", path).stdout
