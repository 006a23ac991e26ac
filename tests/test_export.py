"""Pruned models of the user's own code, given back to the libraries of their layers."""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.layers.config import layer_from_json
from moeprune.layers.layer import new_layer
from moeprune.models.model import Model
from moeprune.models.results import Export
from moeprune.plan import LayerPlan
from tests import peers

SHAPE, D, N, KEPT = (3, 8, 8), 12, 4, 2


class Tower(nn.Module):
    """Patches, two Soft MoE layers with residuals, and a head."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        self.embed = nn.Conv2d(3, D, 2, 2)
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean(1))


def lucidrains(**options) -> nn.Module:
    return Tower(partial(importlib.import_module("soft_moe_pytorch").SoftMoE, D, num_experts=N, **options))


def bwconrad() -> nn.Module:
    from timm.layers import Mlp

    wrapper = importlib.import_module("soft_moe").SoftMoELayerWrapper
    return Tower(partial(wrapper, D, N, 3, layer=Mlp, in_features=D, hidden_features=20))


def fkodom() -> nn.Module:
    return Tower(partial(importlib.import_module("soft_mixture_of_experts.soft_moe").SoftMoE, D, D, N, 2, bias=False))


def ours() -> nn.Module:
    return Tower(
        lambda: new_layer(layer_from_json({"dim": D, "num_experts": N, "slots_per_expert": 2, "hidden_dim": 7}, ""))
    )


CASES = {
    "slots follow the length": (
        "soft-moe-pytorch", partial(lucidrains, seq_len=16), {"num_slots": 4, "expert_mult": 4},
    ),
    "gated, an odd width": (
        "soft-moe-pytorch",
        partial(lucidrains, num_slots=3, geglu=True, expert_mult=2.3, dropout=0.1),
        {"geglu": True, "dropout": 0.1, "use_layernorm": False},
    ),
    "layer norm": ("soft-moe-pytorch", partial(lucidrains, num_slots=1, use_layernorm=True), {"use_layernorm": True}),
    "experts of timm": ("soft-moe", bwconrad, {"slots_per_expert": 3, "normalize": True}),
    "no bias": ("soft-mixture-of-experts", fkodom, {"bias": False, "slots_per_expert": 2}),
    "moeprune": ("moeprune", ours, {}),
}  # fmt: skip


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Prune a model of a factory to KEPT experts and export it: the pruned model and its file."""

    def exported(library: str, factory: Callable[[], nn.Module], **choice) -> tuple[Model, Path, Export]:
        if library != "moeprune" and not peers.has(library.replace("-", "_")):
            pytest.skip(f"{library} is not installed")
        torch.manual_seed(0)
        monkeypatch.setitem(sys.modules, "user_nets", SimpleNamespace(build=factory))
        model = moeprune.adopt(factory(), SHAPE, "user_nets:build")
        choice = {"signal": "random", "compensate": "renorm"} | choice
        pruned = moeprune.prune(model, keep=KEPT, **choice)
        return pruned, tmp_path / "small.pt", moeprune.export(pruned, tmp_path / "small.pt", library)

    return exported


@pytest.mark.parametrize("refitted", [False, True], ids=["renorm", "renorm-refit"])
@pytest.mark.parametrize("case", CASES)
def test_printed_arguments_rebuild_the_layers(case, refitted, exported):
    library, factory, expected = CASES[case]
    data = torch.randn(30, *SHAPE, generator=torch.Generator().manual_seed(2))
    choice = {"compensate": "renorm-refit", "data": data} if refitted else {}
    pruned, file, found = exported(library, factory, **choice)
    assert found.parity.max_relative_difference < 1e-9
    assert found.arguments == {}
    smaller = factory()
    for index, layer in enumerate(smaller.layers):
        told = found.layers[f"layers.{index}"]
        assert told.class_name == f"{type(layer).__module__}.{type(layer).__qualname__}"
        assert expected.items() <= told.arguments.items()
        smaller.layers[index] = rebuilt(layer, told.arguments)
    smaller.load_state_dict(torch.load(file), strict=True)
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(smaller.eval()(x), pruned(x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_became_a_linear_map_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_nets", SimpleNamespace(build=ours))
    model = moeprune.adopt(ours(), SHAPE, "user_nets:build")
    plan = {name: LayerPlan("static", 0, N, "combine", "linear") for name in model.moe_layers}
    pruned = moeprune.prune(model, plan=plan, data=torch.randn(10, *SHAPE))
    with pytest.raises(moeprune.MoepruneError, match=r"layer `module\.layers\.0` is a linear map, without experts"):
        moeprune.export(pruned, tmp_path / "small.pt", "moeprune")


def rebuilt(layer: nn.Module, arguments: dict) -> nn.Module:
    """As a user does it, who knows the experts' class."""
    if "config" in arguments:
        return new_layer(layer_from_json(arguments["config"], ""))
    if "normalize" in arguments:
        return type(layer)(**arguments, layer=type(layer.experts[0]), in_features=D, hidden_features=20)
    return type(layer)(**arguments)


def test_a_class_that_takes_no_such_arguments_leaves_the_parity_unmeasured(exported):
    soft_moe = pytest.importorskip("soft_moe_pytorch").SoftMoE
    init = soft_moe.__init__

    def build() -> nn.Module:
        tower = lucidrains(num_slots=1)
        for layer in tower.layers:
            layer.__class__ = type("SoftMoE", (soft_moe,), {"__init__": lambda self: init(self, D, num_slots=1)})
            layer.__class__.__module__, layer.__class__.__qualname__ = soft_moe.__module__, soft_moe.__qualname__
        return tower

    _, file, found = exported("soft-moe-pytorch", build)
    assert "SoftMoE cannot be built with fewer experts: TypeError" in found.parity.skipped
    assert file.exists()


def test_the_report_names_each_layer(exported, run, tmp_path):
    pruned, file, _ = exported("soft-moe-pytorch", partial(lucidrains, seq_len=16))
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    words = ("export", tmp_path / "pruned.safetensors", "--model", "user_nets:build", "--to", "soft-moe-pytorch")
    result = run(*words, "-o", file, "--force")
    assert result.code == 0, result.stderr
    assert "built with" not in result.stdout
    assert "layers.1  soft_moe_pytorch.soft_moe.SoftMoE(dim=12, num_experts=2, num_slots=4" in result.stdout
