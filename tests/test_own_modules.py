"""Modules of the user's own code that are unusual and sound, such as of several types, or tied."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import moeprune
from moeprune.models.adopted import adopt
from moeprune.models.model import fingerprint, private_copy
from moeprune.pruning.prune import prune
from tests import peers
from tests.stock import some_slow
from tests.test_adopted import CLASSES, CPU, SHAPE, D, dataset, images, lucidrains, randomized
from tests.test_cost import counted
from tests.test_soft_moe import relative_error


class Net(nn.Module):
    """Two layers on the tokens of an image."""

    def __init__(self, layer=None):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, D, 2, 2), nn.Linear(D, CLASSES)
        make = layer or partial(lucidrains.SoftMoE, D, num_experts=4, num_slots=2)
        self.layers = nn.ModuleList(make() for _ in range(2))

    def tokens(self, x: Tensor) -> Tensor:
        t = self.embed(x).flatten(2).mT
        for layer in self.layers:
            t = t + layer(t)
        return t

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


class Float(Net):
    def forward(self, x):
        return self.head(self.tokens(x).mean(1).float())


class Eye(Net):
    def forward(self, x):
        return self.head(self.tokens(x).mean(1) @ torch.eye(D).type_as(self.head.weight.float()))


class Half(Net):
    def forward(self, x):
        return self.head(self.tokens(x.bfloat16()).mean(1))


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(D // 2), torch.arange(D // 2.0)))

    def forward(self, x):
        t = torch.view_as_complex(self.tokens(x).mean(1).unflatten(1, (-1, 2))) * self.turn
        return self.head(torch.view_as_real(t).flatten(1))


PRECISIONS = {
    Net: (torch.float32, "float64"), Float: (torch.float32, "float32"), Eye: (torch.float32, "float32"),
    Half: (torch.bfloat16, "bfloat16"), Complex: (torch.float32, "float64"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype", "measured"), [(kind, *types) for kind, types in PRECISIONS.items()])
def test_parity_is_measured_in_the_precision_that_the_code_allows(kind, dtype, measured, tmp_path):
    torch.manual_seed(0)

    def build() -> nn.Module:
        return kind().to(dtype) if dtype == torch.bfloat16 else kind()

    theirs = randomized(build())
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    model = moeprune.load(tmp_path / "net.pt", build, input_shape=SHAPE)
    assert model.reading.parity.dtype == measured
    assert all(tensor.dtype == theirs.head.weight.dtype for tensor in model.parameters())
    x = images(dtype=dtype)
    assert relative_error(model(x).double(), theirs(x).double()) < (0.1 if dtype == torch.bfloat16 else 1e-5)


class Expert(nn.Sequential):
    """Runs in its own type."""

    def __init__(self):
        super().__init__(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self[0].weight.dtype)).to(x.dtype)


def mixed(narrow=torch.bfloat16) -> nn.Module:
    """Float32 but for the experts."""
    assert peers.has("soft_moe")
    from soft_moe.soft_moe import SoftMoELayerWrapper

    model = Net(partial(SoftMoELayerWrapper, D, 4, 2, Expert))
    for layer in model.layers:
        layer.experts.to(narrow)
    return model


@pytest.mark.parametrize("scope", ["static", "input"])
@pytest.mark.parametrize("compensate", some_slow(["affine", "lstsq", "none"]))
def test_a_router_in_float32_beside_experts_in_bfloat16(tmp_path, scope, compensate, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed_nets.py").write_text("from tests.test_own_modules import mixed\n")
    torch.manual_seed(0)
    theirs = randomized(mixed())
    torch.save(theirs.state_dict(), "net.pt")
    inputs = images(20, 3, torch.float32)
    np.savez("data.npz", inputs=inputs.numpy(), labels=np.arange(20) % CLASSES)
    given = ["net.pt", "--model", "mixed_nets:mixed", "--input-shape", "3,8,8"]
    model = moeprune.load("net.pt", mixed, input_shape=SHAPE)
    assert model.reading.parity.max_relative_difference < 1e-9
    assert relative_error(model(inputs), theirs(inputs)) < 0.02
    assert run("analyze", *given, "--data", "data.npz", "-o", "a.safetensors").code == 0
    method = f"--keep 1/2 --scope {scope} --compensate {compensate} --analysis a.safetensors -o pruned.safetensors"
    found = run("prune", *given, *method.split())
    assert found.code == 0, found.stderr
    pruned = moeprune.load("pruned.safetensors", mixed)
    for layer in pruned.moe_layers.values():
        assert layer.phi.dtype == torch.float32
        assert layer.fc1_weight.dtype == layer.fc2_weight.dtype == torch.bfloat16
    assert run("eval", "pruned.safetensors", "--model", "mixed_nets:mixed", "--data", "data.npz").code == 0
    in_full = prune(
        moeprune.load("net.pt", mixed, input_shape=SHAPE).float(), keep="1/2", scope=scope, compensate=compensate,
        data="data.npz", runtime=CPU,
    )  # fmt: skip
    assert relative_error(pruned(inputs), in_full(inputs)) < 0.1


class Locked(Net):
    def __init__(self):
        super().__init__()
        self.lock, self.settings = threading.Lock(), {"lock": threading.Lock()}

    def forward(self, x):
        with self.lock, self.settings["lock"]:
            return super().forward(x)


class Normed(Net):
    def __init__(self):
        super().__init__()
        nn.utils.weight_norm(self.head)


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Locked, Normed, Lazy])
@pytest.mark.filterwarnings("ignore")
def test_models_that_deepcopy_refuses_are_copied(kind, tmp_path):
    torch.manual_seed(0)
    theirs = kind()
    theirs(images(dtype=torch.float32))
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    for model in (adopt(kind(), SHAPE), moeprune.load(tmp_path / "net.pt", kind, input_shape=SHAPE)):
        pruned = prune(model, keep=2, data=dataset(), runtime=CPU)
        assert moeprune.evaluate(pruned, dataset(), model, CPU).difference.size_reduction > 0
        moeprune.save(pruned, tmp_path / "pruned.safetensors", overwrite=True)
        again = moeprune.load(tmp_path / "pruned.safetensors", kind)
        x = images(dtype=torch.float32)
        assert torch.equal(again(x), pruned(x))


def test_a_model_that_cannot_be_copied_at_all_is_an_error():
    class Closed(Net):
        def __deepcopy__(self, memory):
            raise TypeError("no copies of a Closed")

    model = adopt(Closed(), SHAPE)
    with pytest.raises(moeprune.MoepruneError, match="cannot be copied: TypeError: no copies of a Closed"):
        private_copy(model)


class Tied(Net):
    """Weights under two names, and a layer under two names that runs under the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight
        self.last = self.layers[1]

    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        t = t + self.layers[0](t)
        return self.head(self.second(self.first((t + self.last(t)).mean(1))))


class Listed(Net):
    """Keeps its layers in a list as well, where nobody finds them."""

    def __init__(self):
        super().__init__()
        self.kept = list(self.layers)

    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        return self.head((t + self.kept[1](t + self.kept[0](t))).mean(1))


@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_tied_weights_and_a_layer_under_two_names(writer, tmp_path):
    torch.manual_seed(0)
    theirs, x = Tied(), images(dtype=torch.float32)
    if writer == "torch":
        torch.save(theirs.state_dict(), tmp_path / "net.pt")
    else:
        save_model(theirs, str(tmp_path / "net.pt"))
        (tmp_path / "net.pt").rename(tmp_path / "net.safetensors")
    [path] = tmp_path.glob("net.*")
    model = moeprune.load(path, Tied, input_shape=SHAPE)
    assert list(model.moe_layers) == ["module.layers.0", "module.layers.1"]
    assert relative_error(model(x), theirs(x)) < 1e-5
    assert model.cost().flops_per_input.total == counted(model, x[:1])
    pruned = prune(model, keep=2, signal="random", compensate="renorm", data=dataset(), runtime=CPU)
    assert pruned.module.last is pruned.module.layers[1]
    assert pruned.cost().flops_per_input.total == counted(pruned, x[:1])
    for one in (model, pruned):
        moeprune.save(one, tmp_path / "saved.safetensors", overwrite=True)
        again = moeprune.load(tmp_path / "saved.safetensors", Tied)
        assert again.module.last is again.module.layers[1]
        assert torch.equal(again(x), one(x))
        assert not any(name.startswith("module.last") for name in again.state_dict())
        assert fingerprint(again) == fingerprint(one)
        moeprune.export(one, tmp_path / "back.pt", "soft-moe-pytorch", overwrite=True)
        back = torch.load(tmp_path / "back.pt")
        assert back.keys() == theirs.state_dict().keys() or one is pruned
        assert all(torch.equal(back[name], back[name.replace("last", "layers.1")]) for name in back)
    Tied().load_state_dict(theirs.state_dict(), strict=True)


def test_a_layer_that_the_code_keeps_out_of_sight_is_an_error():
    with pytest.raises(moeprune.MoepruneError, match=r"layers `layers\.0`, `layers\.1` do not run"):
        adopt(Listed(), SHAPE)


class Typed(Net):
    """Takes a tuple as well as a list."""

    def __init__(self, sizes, nested=None):
        super().__init__()
        assert isinstance(sizes, tuple)
        assert nested is None or nested == {"a": [(1, 2), [3]]}


def test_tuples_and_lists_reach_the_factory_as_they_were_given(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "net.pt")
    full = moeprune.load("net.pt", Typed, input_shape=SHAPE, sizes=(16, 16), nested={"a": [(1, 2), [3]]})
    moeprune.save(full, "full.safetensors")
    again = moeprune.load("full.safetensors", Typed)
    assert again.config == full.config
    moeprune.export(again, "back.pt", "soft-moe-pytorch")
    (tmp_path / "typed_nets.py").write_text("from tests.test_own_modules import Typed\n")
    given = ["net.pt", "--model", "typed_nets:Typed", "--input-shape", "3,8,8", "--model-arg"]
    for text in ("sizes=(16, 16)", "sizes=16,16"):
        assert run("inspect", *given, text).code == 0
    assert "AssertionError" in run("inspect", *given, "sizes=[16, 16]").stderr
