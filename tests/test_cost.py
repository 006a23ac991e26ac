"""Shapes, FLOPs and sizes that configurations say, against the models themselves and what torch counts."""

from fractions import Fraction
from itertools import product
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import moeprune
from moeprune.data.datasets import from_tensors
from moeprune.demo.train import initialize, pairs_recipe, single_layer_recipe
from moeprune.evaluation.evaluate import predict
from moeprune.files.checkpoint import tensor_infos
from moeprune.files.header import read_header
from moeprune.layers.config import RouterNorm, SoftMoEConfig
from moeprune.layers.interface import Flops
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import COMPENSATIONS, LOW_RANK, NARROWED, SCOPES, SIGNALS, LayerPlan, is_possible
from moeprune.records import to_json
from tests.stock import some_slow

N = 6
MOE = SoftMoEConfig(12, num_experts=N, slots_per_expert=2, hidden_dim=5)
SINGLE = MOE.replace(num_experts=1, slots_per_expert=1)
SMALL = ViTConfig(
    (8, 12), (4, 2), 3, 7, dim=12, num_heads=3,
    blocks=(
        BlockConfig(mlp_dim=20),
        BlockConfig(soft_moe=MOE),
        BlockConfig(attention=False, mlp_dim=9, residual=False),
        BlockConfig(attention=False, soft_moe=SINGLE, residual=False),
    ),
)  # fmt: skip
FIRST, SECOND = SMALL.moe_layers
OPTIONS = [
    {},
    {"class_token": True},
    {"class_token": True, "pooling": "token"},
    {"class_token": True, "class_position": False, "pooling": "none"},
    {"final_norm": False},
    {"head_norm": True, "final_norm": False},
    {"embedding_norm": True, "head_norm": True, "qk_norm": True, "layer_scale": True},
    {"qkv_bias": False},
    {"activation": "relu"},
    {"num_classes": 0},
]
KINDS = [
    MOE,
    MOE.replace(out_dim=3),
    MOE.replace(expert="geglu", out_dim=7),
    MOE.replace(expert="linear", hidden_dim=None),
    MOE.replace(expert="linear", hidden_dim=None, out_dim=9),
]


def layer_plan(scope: str, signal: str, compensation: str, k: int, rank: int | None = None) -> LayerPlan:
    kept = tuple(range(N - k, N)) if scope == "static" else None
    merged_into = (N - 1,) * (N - k) if compensation == "merge" else None
    return LayerPlan(scope, k, N, signal, compensation, kept, merged_into=merged_into, rank=rank)


def is_plan(scope: str, signal: str, compensation: str, k: int) -> bool:
    needs_one = compensation in ("renorm", "renorm-refit", "merge")
    return is_possible(scope, signal, compensation) and not (k == 0 if needs_one else k and compensation == "linear")


PLANS = [
    layer_plan(*choice, rank=2 if choice[2] in LOW_RANK else None)
    for choice in product(SCOPES, SIGNALS, COMPENSATIONS, (0, 1, 4, N))
    if is_plan(*choice)
]
NARROW = [
    layer_plan(scope, "combine", compensation, 4, rank=3)
    for scope, compensation in product(SCOPES, NARROWED)
    if is_possible(scope, "combine", compensation)
]


def with_router(config: ViTConfig, router_norm: str, **changes) -> ViTConfig:
    blocks = (
        block if block.soft_moe is None
        else block.replace(soft_moe=block.soft_moe.replace(router_norm=router_norm, **changes))
        for block in config.blocks
    )  # fmt: skip
    return config.replace(blocks=tuple(blocks))


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def counted(module: torch.nn.Module, x: torch.Tensor) -> int:
    """What torch counts; attention as matrix products, for the fused one is not counted on CPUs."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(x)
    return counter.get_total_flops()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random_model(config: ViTConfig) -> SoftMoEViT:
    model = SoftMoEViT(config)
    initialize(model, 4.0, 0.1, torch.Generator().manual_seed(0))
    return model.requires_grad_(False).eval()


DENSE = {
    "single": single_layer_recipe().config,
    "vit": pairs_recipe().config,
    **{str(options): SMALL.replace(**options) for options in OPTIONS},
    **{norm: with_router(SMALL, norm, dispatch_input="raw") for norm in get_args(RouterNorm)},
    **{
        f"{kind.expert} experts": SMALL.replace(blocks=(BlockConfig(soft_moe=kind),))
        for kind in KINDS
        if kind.output_width == 12
    },
}


@pytest.mark.parametrize("name", DENSE)
def test_shapes_and_flops_of_dense_models(name):
    config = DENSE[name]
    model = random_model(config)
    assert config.shapes({}) == shapes(model)
    for b in (1, 3):
        assert counted(model, drawn(b, *config.input_shape)) == b * config.flops({}).total


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("router_norm", some_slow(get_args(RouterNorm)))
@pytest.mark.parametrize("scope", SCOPES)
def test_shapes_of_pruned_models(scope, router_norm):
    config = with_router(SMALL, router_norm)
    for index, plan in enumerate(plan for plan in PLANS if plan.scope == scope):
        k = 0 if plan.compensation == "linear" else 1
        kept = tuple(range(k)) if scope == "static" else None
        second = plan.replace(k=k, num_experts=1, kept=kept, merged_into=None)
        plans = {FIRST: plan, SECOND: second} if index % 5 else {FIRST: plan}
        with torch.device("meta"):
            assert config.shapes(plans) == shapes(SoftMoEViT(config, plans)), plan


@pytest.mark.parametrize("name", ["vit", "{'class_token': True}", "{}"])
@pytest.mark.parametrize("keep", [1, Fraction(1, 2)])
def test_flops_of_a_static_renorm_model(name, keep):
    model = random_model(DENSE[name])
    pruned = moeprune.prune(model, keep=keep, signal="random", compensate="renorm")
    flops = model.config.flops(pruned.plan)
    assert flops.total < model.config.flops({}).total
    assert counted(pruned, drawn(2, *model.config.input_shape)) == 2 * flops.total


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("config", KINDS, ids=lambda config: f"{config.expert}-{config.out_dim}")
def test_shapes_and_flops_of_pruned_layers(config):
    for plan in (None, *PLANS, *NARROW):
        layer = SoftMoE(config, plan)
        assert config.shapes(plan) == shapes(layer), plan
        if plan is None or plan.signal == "combine":
            assert counted(layer, drawn(2, 9, 12)) == 2 * config.flops(9, plan).total, plan


@pytest.mark.parametrize(
    ("compensation", "rank"), [("mean", None), ("lstsq", None), ("lstsq", 2), ("affine", None), ("affine", 2)]
)
def test_flops_of_dynamic_slots_count_padded_tokens(compensation, rank):
    config = SoftMoEConfig(8, 4, 4, 6, router_norm="none", dynamic_slots=True)
    plan = LayerPlan("input", 2, 4, "combine", compensation, rank=rank)
    for tokens in (13, 16):
        assert counted(SoftMoE(config, plan), drawn(2, tokens, 8)) == 2 * config.flops(tokens, plan).total


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        # 12 slots: logits, dispatch, combine of 9·12·12 multiply-adds each; 2·12·5 of each slot's expert
        (None, Flops(experts=2880, routing=7776)),
        (("input", "none", 2), Flops(experts=960, routing=2592 + 2 * 864)),
        (("static", "renorm", 2), Flops(experts=960, routing=3 * 864)),
        (("static", "lstsq", 2), Flops(experts=960, routing=2592 + 2 * 864, compensation=4 * 432)),
        (("batch", "mean", 2), Flops(experts=960, routing=2592 + 2 * 864, compensation=2592)),
        (("batch", "mean", 6), Flops(experts=2880, routing=7776)),
    ],
)
def test_flops_are_split_by_what_they_are_for(plan, expected):
    if plan is not None:
        scope, compensation, k = plan
        plan = layer_plan(scope, "combine", compensation, k)
    assert MOE.flops(9, plan) == expected


@pytest.mark.parametrize("compensate", ["none", "renorm", "affine", "low-rank"])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_flops_of_a_mass_are_those_of_what_runs_in_batches_of_any_size(batch_size, compensate):
    """Experts run for the inputs that need them, dispatch and combine for as many as any input needs."""
    model = random_model(SMALL.replace(blocks=SMALL.blocks[:2]))
    x, labels = drawn(12, *SMALL.input_shape), torch.arange(12) % 7
    data = from_tensors("drawn", x, labels, 7)
    rank = 2 if compensate in LOW_RANK else None
    plan = {FIRST: LayerPlan("input", N, N, "combine", compensate, mass=0.6, rank=rank)}
    pruned = moeprune.prune(model, plan=plan, data=data, runtime=moeprune.Runtime("cpu"))
    [predictions] = predict([pruned], data, moeprune.Runtime("cpu", batch_size=batch_size))
    cost = pruned.cost(predictions.usage).flops_per_input
    assert cost.total == pytest.approx(sum(counted(pruned, part) for part in x.split(batch_size)) / 12, abs=1)
    [usage] = predictions.usage.values()
    assert usage.running < usage.applied or batch_size == 1


def test_what_tensors_serve():
    config = with_router(SMALL, "rms")
    parts: dict[str, set[str]] = {}
    for name in config.shapes({FIRST: layer_plan("input", "deviation", "affine", 2)}):
        layer, _, tensor = name.rpartition(".")
        if layer == FIRST:
            parts.setdefault(config.moe_layers[layer].part(tensor), set()).add(tensor)
    assert parts == {
        "routing": {"phi", "input_gain", "phi_gain", "score_weights"},
        "compensation": {"surrogate", "affine_token", "affine_mean", "affine_bias"},
        "experts": {"fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"},
    }


@pytest.mark.parametrize("plan", [None, *PLANS[::7]], ids=str)
def test_a_model_and_its_file_are_of_one_size(plan, tmp_path):
    model = SoftMoEViT(SMALL, {} if plan is None else {FIRST: plan}).half()
    moeprune.save(model, tmp_path / "x.safetensors")
    tensors = read_header(tmp_path / "x.safetensors").tensors
    assert tensors == tensor_infos(model.state_dict())
    size = model.cost()
    assert size == model.config.cost(model.plan, tensors)
    assert size.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    assert size.bytes == sum(to_json(size.bytes_by_part).values()) == 2 * size.parameters
    stored = sum(len(layer.fc1_weight) for layer in model.moe_layers.values())
    assert size.bytes_by_part.experts == 2 * stored * (12 * 5 + 5 + 5 * 12 + 12)
    assert size.experts_per_input == 1 + (N if plan is None else plan.k)
