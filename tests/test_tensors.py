"""The tensors that a model has, against the models themselves."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from moeprune.demo.train import pairs_recipe, single_layer_recipe
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.header import read_header
from moeprune.layers.config import ROUTER_NORMS, SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.cost import size_and_cost
from moeprune.models.model import save
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import COMPENSATIONS, SCOPES, SIGNALS, LayerPlan, is_possible
from moeprune.records import to_json
from tests.reference import replace

MOE = SoftMoEConfig(dim=12, num_experts=5, slots_per_expert=2, hidden_dim=7)
MIXED = ViTConfig(
    image_size=(8, 12),
    patch_size=(4, 2),
    in_channels=3,
    num_classes=11,
    dim=12,
    num_heads=3,
    blocks=(
        BlockConfig(mlp_dim=20),
        BlockConfig(soft_moe=MOE),
        BlockConfig(attention=False, mlp_dim=9, residual=False),
        BlockConfig(attention=False, soft_moe=replace(MOE, num_experts=1, slots_per_expert=1)),
    ),
)
FIRST, SECOND = MIXED.moe_layers
PLANS = [
    LayerPlan(
        scope, k, 5, signal, compensation, tuple(range(5 - k, 5)) if scope == "static" else None,
        merged_into=(4,) * (5 - k) if compensation == "merge" else None,
    )
    for scope, signal, compensation, k in product(SCOPES, SIGNALS, COMPENSATIONS, (0, 1, 3, 5))
    if is_possible(scope, signal, compensation)
    if k or compensation not in ("renorm", "merge")
]  # fmt: skip


def with_router(config: ViTConfig, router_norm: str) -> ViTConfig:
    def changed(block: BlockConfig) -> BlockConfig:
        moe = block.soft_moe
        return block if moe is None else replace(block, soft_moe=replace(moe, router_norm=router_norm))

    return replace(config, blocks=tuple(map(changed, config.blocks)))


KINDS = [
    {"expert": "geglu"},
    {"expert": "linear", "hidden_dim": None},
    {"expert": "linear", "hidden_dim": None, "out_dim": 9},
    {"out_dim": 3},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [None, *PLANS[::5]], ids=str)
def test_shapes_of_layers_of_every_kind(plan, kind):
    config = replace(MOE, **kind)
    with torch.device("meta"):
        layer = SoftMoE(config, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert config.shapes(plan) == expected


def check_shapes(config: ViTConfig, plan: dict[str, LayerPlan]) -> None:
    with torch.device("meta"):
        model = SoftMoEViT(config, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert config.shapes(plan) == expected, plan


@pytest.mark.parametrize(("class_token", "pooling"), [(False, "mean"), (True, "mean"), (True, "token")])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("router_norm", ROUTER_NORMS)
def test_shapes_of_dense_models(router_norm, final_norm, class_token, pooling):
    config = replace(MIXED, final_norm=final_norm, class_token=class_token, pooling=pooling)
    check_shapes(with_router(config, router_norm), {})


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": True, "class_position": False, "pooling": "none"},
        {"embedding_norm": True},
        {"head_norm": True, "final_norm": False},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"layer_scale": True},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_shapes_of_models_with_options(options):
    check_shapes(replace(MIXED, **options), {})


@pytest.mark.parametrize(
    "config", [single_layer_recipe().config, pairs_recipe().config], ids=["single", "vit"]
)
def test_shapes_of_the_shipped_models(config):
    check_shapes(config, {})


@pytest.mark.parametrize("router_norm", ROUTER_NORMS)
@pytest.mark.parametrize("scope", SCOPES)
def test_shapes_of_pruned_models(scope, router_norm):
    config = with_router(MIXED, router_norm)
    kept = (0,) if scope == "static" else None
    for index, plan in enumerate(plan for plan in PLANS if plan.scope == scope):
        second = replace(plan, k=1, num_experts=1, kept=kept, merged_into=None)
        check_shapes(config, {FIRST: plan, SECOND: second} if index % 5 else {FIRST: plan})


def test_what_tensors_serve():
    plan = LayerPlan("input", 2, 5, "deviation", "affine")
    parts: dict[str, set[str]] = {}
    config = with_router(MIXED, "rms")
    for name in config.shapes({FIRST: plan}):
        layer, _, key = name.rpartition(".")
        part = config.moe_layers[layer].part(key) if layer in config.moe_layers else "other"
        parts.setdefault(part, set()).add(name)
    other = parts.pop("other")
    assert not any("soft_moe" in name for name in other)
    assert {"position", "head.weight", "blocks.0.mlp.0.weight", "blocks.1.norm2.bias"} <= other
    layer_parts = {part: {n.removeprefix(f"{FIRST}.") for n in names} for part, names in parts.items()}
    second = {f"{SECOND}.{name}" for name in ("phi", "input_gain", "phi_gain")}
    assert layer_parts["routing"] == {"phi", "input_gain", "phi_gain", "score_weights"} | second
    assert layer_parts["compensation"] == {"surrogate", "affine_token", "affine_mean", "affine_bias"}
    weights = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    assert layer_parts["experts"] == {*weights, *(f"{SECOND}.{name}" for name in weights)}


@pytest.mark.parametrize("plan", [None, *PLANS[::7]], ids=str)
def test_a_model_and_its_file_are_of_one_size(plan, tmp_path):
    model = SoftMoEViT(MIXED, {} if plan is None else {FIRST: plan}).half()
    save(model, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors").tensors
    assert tensors == tensor_infos(model.state_dict())
    size = model.cost()
    assert size == size_and_cost(model.config, model.plan, tensors)
    assert size.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert size.bytes == sum(to_json(size.bytes_by_part).values()) == 2 * size.parameters
    stored = sum(len(layer.fc1_weight) for layer in model.moe_layers.values())
    assert size.bytes_by_part.experts == 2 * stored * (12 * 7 + 7 + 7 * 12 + 12)
    assert size.experts_per_input == 1 + (5 if plan is None else plan.k)
