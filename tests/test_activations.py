"""Experts as people train them: every activation, with and without biases and gates."""

import math
from typing import get_args

import pytest
import torch

import moeprune
from moeprune.files.header import read_header
from moeprune.layers import experts as routed
from moeprune.layers.activations import ACTIVATIONS
from moeprune.layers.config import Activation, SoftMoEConfig
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from moeprune.records import to_json
from tests.reference import gelu, reference_layer, reference_mass
from tests.test_cost import counted
from tests.test_soft_moe import SoftMoE, relative_error

B, M, D, N, P, H = 3, 5, 6, 4, 2, 7
FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x**2 * (x > 0),
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.maximum(x, x / 100),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "selu": lambda x: 1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * (x.exp() - 1)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "mish": lambda x: x * torch.tanh(torch.log(1 + x.exp())),
    "softplus": lambda x: torch.log(1 + x.exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: 1 * x,
}
EXPERTS = [("mlp", True), ("mlp", False), ("glu", True), ("glu", False)]
EVERY_EXPERT = [(kind, name, bias) for kind, bias in EXPERTS for name in get_args(Activation)]
EVERY_EXPERT += [("linear", "gelu", False)]


def config(expert: str, activation: str, bias: bool, **changes) -> SoftMoEConfig:
    hidden = None if expert == "linear" else H
    return SoftMoEConfig(D, N, P, hidden, expert=expert, activation=activation, bias=bias, **changes)


def dense(*expert, **changes) -> SoftMoE:
    layer = SoftMoE(config(*expert, **changes)).double().requires_grad_(False).eval()
    layer.reset_parameters(torch.Generator().manual_seed(0), scale=4.0)
    for name, tensor in layer.named_parameters():
        if name.startswith("fc1"):
            tensor.mul_(20)  # to where activations differ
    return layer


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, M, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(layer: SoftMoE, x, kept=None, compensation="none", u=None) -> torch.Tensor:
    router = layer.config.router_norm, layer.config.dispatch_input
    function = FORMULAS[layer.config.activation]
    return reference_layer(x, layer.state_dict(), *router, kept, compensation, u, activation=function)


def test_every_activation_has_a_function_and_a_formula():
    assert list(ACTIVATIONS) == list(FORMULAS) == list(get_args(Activation))


@pytest.mark.parametrize(("kind", "activation", "bias"), EVERY_EXPERT)
def test_experts_compute_their_formulas(kind, activation, bias, monkeypatch):
    layer, x = dense(kind, activation, bias), tokens()
    assert any("bias" in name for name in layer.state_dict()) == bias
    assert relative_error(layer(x), expected(layer, x)) < 1e-10
    u = torch.randn(N, P, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    static = prune_layer(layer, LayerPlan("static", 2, N, "combine", "mean", (0, 3)), Calibrated(None, u))
    assert relative_error(static(x), expected(layer, x, [(0, 3)] * B, "mean", u)) < 1e-10
    mass = torch.tensor(reference_mass(x, layer.state_dict(), "l2", "normalized"))
    best = mass.topk(2).indices.sort().values.tolist()
    chosen = prune_layer(layer, LayerPlan("input", 2, N, "combine", "none"))
    for limit in (routed.GATHERED, 0):  # experts' weights are copied, or used where they lie
        monkeypatch.setattr(routed, "GATHERED", limit)
        assert relative_error(chosen(x), expected(layer, x, best)) < 1e-10


@pytest.mark.parametrize(("kind", "bias"), [*EXPERTS, ("linear", False)])
def test_merged_experts_without_biases(kind, bias):
    layer = dense(kind, "gelu" if kind == "linear" else "relu", bias)
    for tensor in layer.experts.tensors:
        tensor[3] = tensor[1]
    if kind != "linear":
        order = torch.randperm(H, generator=torch.Generator().manual_seed(0))
        columns = torch.cat([order, order + H]) if kind == "glu" else order
        layer.fc1_weight[3] = layer.fc1_weight[1][:, columns]
        layer.fc2_weight[3] = layer.fc2_weight[1][:, order]
        if bias:
            layer.fc1_bias[3] = layer.fc1_bias[1][columns]
    plan = LayerPlan("static", 3, N, "combine", "merge", (0, 1, 2), merged_into=(1,))
    merged = prune_layer(layer, plan, Calibrated(mean_mass=torch.rand(N)))
    assert relative_error(merged(tokens()), layer(tokens())) < 1e-12


def model_of(*expert) -> SoftMoEViT:
    """The paper's setting: one Soft MoE layer in place of its input."""
    block = BlockConfig(attention=False, soft_moe=config(*expert), residual=False)
    torch.manual_seed(0)
    return SoftMoEViT(ViTConfig((4, 4), (2, 2), 1, 3, dim=D, num_heads=1, blocks=(block,))).eval()


PAPER = ("mlp", "relu", False)


@pytest.mark.parametrize("expert", [PAPER, ("glu", "silu", True), ("geglu", "gelu", True), ("linear", "gelu", False)])
def test_pruned_and_saved_models_compute_the_same(expert, tmp_path):
    model, path = model_of(*expert), tmp_path / "model.safetensors"
    moeprune.save(model, path)
    images = torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moeprune.load(path)(images), model(images))
    names = set(read_header(path).tensors)
    assert any(name.startswith("blocks.0.soft_moe.fc") and name.endswith("bias") for name in names) == expert[2]
    for settings in (
        {"compensate": "refit", "signal": "gram"}, {"scope": "input", "compensate": "affine"},
        {"compensate": "merge"}, {"compensate": "renorm", "signal": "deviation"},
    ):  # fmt: skip
        pruned = moeprune.prune(path, images, keep=2, **settings)
        moeprune.save(pruned, tmp_path / "pruned.safetensors", overwrite=True)
        again = moeprune.load(tmp_path / "pruned.safetensors")
        assert torch.equal(again(images), pruned(images)), settings
        with torch.no_grad():
            assert counted(again, images) == len(images) * again.config.flops(again.plan).total


def test_only_what_is_not_usual_is_in_the_file():
    plain = SoftMoEConfig(D, N, P, H)
    assert plain.replace(activation="gelu", bias=True) == plain
    assert not {"expert", "activation", "bias"} & set(to_json(plain))
    assert to_json(config("geglu", "gelu", True))["expert"] == "geglu"
    assert {"activation": "relu", "bias": False}.items() <= to_json(config(*PAPER)).items()


@pytest.mark.parametrize(
    ("expert", "activation", "message"),
    [
        ("mlp", "gleu", "`activation`: expected one of gelu, gelu_tanh"),
        ("geglu", "silu", "`activation` is 'silu', but an expert `geglu` has the activation `gelu`"),
        ("linear", "relu", "`activation` is 'relu', but an expert `linear` has no activation"),
    ],
)
def test_activations_that_do_not_fit(expert, activation, message):
    with pytest.raises(moeprune.MoepruneError, match=message):
        config(expert, activation, True)
