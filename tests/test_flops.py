from fractions import Fraction
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moeprune
from moeprune.data.datasets import from_tensors
from moeprune.demo.train import initialize, pairs_recipe, single_layer_recipe
from moeprune.evaluation.evaluate import predict
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.flops import Flops
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import COMPENSATIONS, FITTED, SCOPES, LayerPlan, is_possible
from tests.reference import replace

MOE = SoftMoEConfig(12, num_experts=6, slots_per_expert=2, hidden_dim=5)
ATTENTION_AND_MLP = BlockConfig(mlp_dim=20)
ATTENTION_AND_MOE = BlockConfig(soft_moe=MOE)
MOE_ALONE = BlockConfig(attention=False, soft_moe=MOE, residual=False)
SMALL = ViTConfig((8, 12), (4, 2), 3, 7, dim=12, num_heads=3, blocks=(ATTENTION_AND_MLP, ATTENTION_AND_MOE))
CONFIGS = {
    "single": single_layer_recipe().config,
    "vit": pairs_recipe().config,
    "small": SMALL,
    "class_token": replace(SMALL, class_token=True),
    "token_pooling": replace(SMALL, class_token=True, pooling="token"),
    "no_attention": replace(SMALL, blocks=(MOE_ALONE, BlockConfig(attention=False, mlp_dim=9), MOE_ALONE)),
    "no_final_norm": replace(SMALL, final_norm=False),
    "every_token": replace(SMALL, class_token=True, class_position=False, pooling="none"),
    "headless": replace(SMALL, num_classes=0),
    "more_norms": replace(SMALL, embedding_norm=True, head_norm=True, qk_norm=True, layer_scale=True),
    "no_qkv_bias": replace(SMALL, qkv_bias=False),
    "other_routers": replace(
        SMALL,
        blocks=(
            BlockConfig(soft_moe=replace(MOE, router_norm="none", dispatch_input="raw")),
            BlockConfig(soft_moe=replace(MOE, router_norm="rms", dispatch_input="raw", num_experts=1)),
        ),
    ),
    "other_experts": replace(
        SMALL,
        blocks=(
            BlockConfig(soft_moe=replace(MOE, expert="geglu", router_norm="layer")),
            BlockConfig(soft_moe=replace(MOE, expert="linear", hidden_dim=None)),
        ),
    ),
}


def random_model(config: ViTConfig) -> SoftMoEViT:
    model = SoftMoEViT(config)
    initialize(model, 4.0, 0.1, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


def counted(module: torch.nn.Module, x: torch.Tensor) -> int:
    """What torch counts; attention as matrix products, for the fused one is not counted on CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(x)
    return counter.get_total_flops()


def images(config: ViTConfig, b: int) -> torch.Tensor:
    return torch.randn(b, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_a_dense_model_equal_what_torch_counts(name, b):
    config = CONFIGS[name]
    assert counted(random_model(config), images(config, b)) == b * config.flops({}).total


@pytest.mark.parametrize("name", ["vit", "class_token", "no_attention"])
@pytest.mark.parametrize("keep", [1, Fraction(1, 2)])
def test_flops_of_a_static_renorm_model_equal_what_torch_counts(name, keep):
    model = random_model(CONFIGS[name])
    pruned = moeprune.prune(model, keep=keep, signal="random", compensate="renorm")
    flops = model.config.flops(pruned.plan)
    assert flops.total < model.config.flops({}).total
    assert counted(pruned, images(model.config, 2)) == 2 * flops.total


PLANS = [
    (scope, compensation, k)
    for scope, compensation, k in product(SCOPES, COMPENSATIONS, (0, 1, 4, 6))
    if is_possible(scope, "combine", compensation)
    if k or compensation not in ("renorm", "merge")
]


KINDS = [
    MOE,
    replace(MOE, expert="geglu", out_dim=7),
    replace(MOE, expert="linear", hidden_dim=None, out_dim=9),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.expert)
@pytest.mark.parametrize(("scope", "compensation", "k"), PLANS)
def test_flops_of_a_pruned_layer_equal_what_torch_counts(scope, compensation, k, config):
    layer = SoftMoE(config)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    is_static = scope == "static"
    plan = LayerPlan(scope, k, 6, "combine", compensation, tuple(range(k)) if is_static else None)
    if plan.merges:
        plan = replace(plan, merged_into=tuple(j % k for j in plan.dropped))
    pruned = prune_layer(layer, plan, Calibrated(None, torch.ones(layer.term_shape), torch.ones(6)))
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    assert counted(pruned, x) == 2 * config.flops(9, pruned.plan).total


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.expert)
@pytest.mark.parametrize("compensation", FITTED)
@pytest.mark.parametrize("scope", ["static", "input"])
def test_flops_of_few_directions_equal_what_torch_counts(scope, compensation, config):
    if not is_possible(scope, "combine", compensation):
        return
    plan = LayerPlan(
        scope, 4, 6, "combine", compensation, (0, 1, 2, 5) if scope == "static" else None, rank=3
    )
    layer = SoftMoE(config, plan)
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))
    assert counted(layer, x) == 2 * config.flops(9, plan).total


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        # 12 slots: logits, dispatch, combine of 9·12·12 multiply-adds each; 2·12·5 of each slot's expert
        (None, Flops(experts=2880, routing=7776)),
        (LayerPlan("input", 2, 6, "combine", "none"), Flops(experts=960, routing=2592 + 2 * 864)),
        (LayerPlan("static", 2, 6, "combine", "renorm", (0, 3)), Flops(experts=960, routing=3 * 864)),
        (
            LayerPlan("static", 2, 6, "combine", "lstsq", (0, 3)),
            Flops(experts=960, routing=2592 + 2 * 864, compensation=4 * 432),
        ),
        (
            LayerPlan("batch", 2, 6, "combine", "mean"),
            Flops(experts=960, routing=2592 + 2 * 864, compensation=2592),
        ),
        (LayerPlan("batch", 6, 6, "combine", "mean"), Flops(experts=2880, routing=7776)),
    ],
)
def test_flops_are_split_by_what_they_are_for(plan, expected):
    assert MOE.flops(9, plan) == expected


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("compensation", ["mean", "lstsq", "affine"])
def test_flops_of_dynamic_slots_count_padded_tokens(compensation, rank):
    config = SoftMoEConfig(8, 4, 4, 6, router_norm="none", dynamic_slots=True)
    if rank is not None and compensation == "mean":
        return
    plan = LayerPlan("input", 2, 4, "combine", compensation, rank=rank)
    layer = SoftMoE(config, plan)
    for tokens in (13, 16):
        x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(1))
        assert counted(layer, x) == 2 * config.flops(tokens, plan).total


@pytest.mark.parametrize("compensate", ["none", "renorm", "affine"])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_flops_of_a_mass_are_those_of_what_runs_in_batches_of_any_size(batch_size, compensate):
    """Experts run for the inputs that need them, dispatch and combine for as many as any input needs."""
    model = random_model(CONFIGS["small"])
    x, labels = images(SMALL, 12), torch.arange(12) % 7
    data = from_tensors("drawn", x, labels, 7)
    plan = {
        name: LayerPlan("input", 6, 6, "combine", compensate, mass=0.6) for name in model.config.moe_layers
    }
    pruned = moeprune.prune(model, plan=plan, data=data, runtime=Runtime("cpu"))
    [predictions] = predict([pruned], data, Runtime("cpu", batch_size=batch_size))
    cost = pruned.cost(predictions.usage).flops_per_input
    total = sum(counted(pruned, part) for part in x.split(batch_size))
    assert cost.total == pytest.approx(total / 12, abs=1)
    [usage] = predictions.usage.values()
    assert usage.running < usage.applied or batch_size == 1
