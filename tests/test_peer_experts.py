"""Experts of all kinds in layers of other libraries and in copies of these, against their own forward pass."""

import sys
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeprune
from moeprune.models.libraries.layers import LAYERS
from moeprune.models.model import Model
from tests import peers
from tests.test_export import KEPT, SHAPE, D, N, Tower
from tests.test_soft_moe import relative_error

if not (peers.has("soft_moe") and peers.has("soft_moe_pytorch")):
    pytest.skip("needs soft-moe and soft-moe-pytorch", allow_module_level=True)
import soft_moe_pytorch.soft_moe as lucidrains
from soft_moe import SoftMoELayerWrapper
from timm.layers import GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU

from tests.test_lookalikes import copied


class Functional(nn.Module):
    """As in the MNIST experiments of the paper: ReLU, no biases; the activation is no module."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 7, bias=False), nn.Linear(7, D, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Llama(nn.Module):
    """Three linears, all of one shape, in an order that is not that of the data flow."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Residual(Functional):
    def forward(self, x):
        return x + super().forward(x)


class Scaled(Functional):
    """A parameter that changes nothing yet."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * super().forward(x)


def sequence(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 7), activation, nn.Linear(7, D))


EXPERTS = {
    "paper": (Functional, "mlp", "relu", False),
    "relu": (partial(Mlp, D, 7, act_layer=nn.ReLU), "mlp", "relu", True),
    "tanh gelu, one bias": (partial(Mlp, D, 7, act_layer=GELUTanh, bias=(True, False)), "mlp", "gelu_tanh", True),
    "quick gelu": (partial(Mlp, D, D, act_layer=QuickGELU), "mlp", "quick_gelu", True),
    "silu, square": (partial(Mlp, D, D, act_layer=nn.SiLU, bias=False), "mlp", "silu", False),
    "a tanh for each": (partial(sequence, nn.Tanh()), "mlp", "tanh", True),
    "glu": (partial(GluMlp, D, 8), "glu", "sigmoid", True),
    "gate first": (partial(GluMlp, D, 8, act_layer=nn.SiLU, gate_last=False), "glu", "silu", True),
    "geglu": (partial(GluMlp, D, 8, act_layer=nn.GELU, bias=False), "geglu", "gelu", False),
    "two linears first": (partial(SwiGLU, D, 8), "glu", "silu", True),
    "llama": (Llama, "glu", "silu", False),
    "linear": (partial(nn.Linear, D, D), "linear", "gelu", True),
}


def of_bwconrad(expert, kind: type = SoftMoELayerWrapper) -> nn.Module:
    return Tower(lambda: kind(D, N, 2, layer=expert))


def adopted(theirs: nn.Module, expert: str, activation: str, bias: bool, tolerance: float = 1e-12) -> Model:
    """The adopted model, which computes the same and has such experts."""
    x = torch.randn(3, *SHAPE).to(next(theirs.parameters()))
    with torch.no_grad():
        expected = theirs.eval()(x)
    model = moeprune.adopt(theirs, SHAPE, "user_nets:build")
    assert relative_error(model(x), expected) < tolerance
    for layer in model.config.moe_layers.values():
        assert (layer.expert, layer.activation, layer.bias) == (expert, activation, bias)
    return model


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_taken_and_given_back(case, tmp_path, monkeypatch):
    make, *kind = EXPERTS[case]
    torch.manual_seed(0)
    adopted(of_bwconrad(make).double(), *kind)
    monkeypatch.setitem(sys.modules, "user_nets", SimpleNamespace(build=lambda: of_bwconrad(make)))
    model = adopted(of_bwconrad(make), *kind, tolerance=1e-5)
    pruned = moeprune.prune(model, keep=KEPT, signal="random", compensate="renorm")
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    again = moeprune.load(tmp_path / "pruned.safetensors", "user_nets:build")
    found = moeprune.export(again, tmp_path / "small.pt", "soft-moe")
    assert found.parity.max_relative_difference < 1e-9


def of_lucidrains(old: str, new: str, **options) -> nn.Module:
    """With layers of a copy of the library's code in which something is replaced."""
    return Tower(partial(copied(lucidrains, "SoftMoE", **{old: new}), D, num_slots=2, **options))


COPIES = {
    "soft-moe": (lambda: of_bwconrad(Functional, type("Mine", (SoftMoELayerWrapper,), {})), "mlp", "relu", False),
    "soft-moe-pytorch": (lambda: of_lucidrains("nn.GELU()", "nn.SiLU()"), "mlp", "silu", True),
    "gates": (lambda: of_lucidrains("x * F.gelu(gate)", "x.relu() * gate", geglu=True), "glu", "relu", True),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies_of_layers_with_other_activations(case):
    make, *kind = COPIES[case]
    adopted(make().double(), *kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forms_of_narrow_experts_are_found_in_float64(dtype):
    model = adopted(of_bwconrad(partial(Mlp, D, 7, act_layer=GELUTanh)).to(dtype), "mlp", "gelu_tanh", True, 0.1)
    assert model.moe_layers["module.layers.0"].fc1_weight.dtype == dtype


KINDS = cycle([nn.ReLU, nn.SiLU])
OTHERS = {
    "residual": (Residual, "is a Residual of Linear"),
    "parameter": (Scaled, "is a Scaled of Linear"),
    "unknown slope": (partial(sequence, nn.LeakyReLU(0.3)), "computes none of: one linear; two linears with"),
    "norm": (partial(Mlp, D, 7, norm_layer=nn.LayerNorm), "computes none of"),
    "of several kinds": (
        lambda: sequence(next(KINDS)()),
        r"expert `layers\.0\.experts\.1`, a Sequential of .*SiLU.*, does not compute what `layers\.0\.experts\.0` does",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_experts_that_cannot_be_expressed(case):
    make, message = OTHERS[case]
    with pytest.raises(moeprune.MoepruneError, match=message):
        moeprune.adopt(of_bwconrad(make), SHAPE)


def test_a_layer_of_linear_experts_without_biases_has_none():
    layers = pytest.importorskip("soft_mixture_of_experts.soft_moe")
    adopted(Tower(partial(layers.SoftMoE, D, D, N, 2, bias=False)).double(), "linear", "gelu", False)


def test_biases_of_zero_that_earlier_versions_wrote_are_left_out_on_the_way_back():
    layers = pytest.importorskip("soft_mixture_of_experts.soft_moe")
    layer, library = layers.SoftMoE(D, D, N, 2, bias=False), LAYERS["soft-mixture-of-experts"]
    tensors = library.describe(layer, "moe", 4, None)[1] | {"fc2_bias": torch.zeros(N, D)}
    assert library.restore(layer, tensors).keys() == layer.state_dict().keys()
