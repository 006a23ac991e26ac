"""Layers that are not a library's own, but a subclass, a copy of its code, or something else with its tensors."""

import inspect
import re
import types

import pytest
import torch
from torch import nn

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models.adopted import adopt
from tests import peers
from tests.test_adopted import CLASSES, SHAPE, D, images, lucidrains, randomized
from tests.test_soft_moe import relative_error

if not peers.has("soft_moe"):
    pytest.skip("needs soft-moe", allow_module_level=True)
from soft_moe import soft_moe as layers


class Net(nn.Module):
    """A layer of soft-moe-pytorch and another one."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, D, 2, 2), nn.Linear(D, CLASSES)
        self.layers = nn.ModuleList([lucidrains.SoftMoE(D, num_experts=4, num_slots=1), other])

    def forward(self, x):
        t = self.embed(x).flatten(2).mT
        for layer in self.layers:
            t = t + layer(t)
        return self.head(t.mean(1))


def copied(module: types.ModuleType, name: str, **changes: str):
    """A class of a copy of a library's file."""
    source = inspect.getsource(module)
    for old, new in changes.items():
        assert old in source
        source = source.replace(old, new)
    copy = types.ModuleType("vendored")
    exec(compile(source, "vendored.py", "exec"), copy.__dict__)
    return getattr(copy, name)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))


class Subclass(lucidrains.SoftMoE):
    """With a constructor of its own."""

    def __init__(self, base=lucidrains.SoftMoE):
        super().__init__(D, num_experts=4, num_slots=2, geglu=True)


class Residual(Subclass):
    """Computes something else."""

    def forward(self, x):
        return x + super().forward(x)


class Pair(Subclass):
    """Gives an auxiliary loss, too."""

    def forward(self, x):
        return super().forward(x), x.mean()


class Other(nn.Module):
    """A Soft MoE layer of nobody's."""

    def __init__(self):
        super().__init__()
        self.router = nn.Module()
        self.router.phi = nn.Parameter(torch.randn(D, 4))
        self.ffn_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        logits = x @ self.router.phi
        slots = logits.softmax(1).mT @ x
        return logits.softmax(2) @ torch.stack([f(slots[:, j]) for j, f in enumerate(self.ffn_experts)], 1)


class Bias(Subclass):
    """Has a tensor more."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return super().forward(x) + self.bias


def of_soft_moe(of: type) -> nn.Module:
    return of(D, 4, 2, Mlp)


def of_fkodom(of: type) -> nn.Module:
    return of(D, D, 4, 2)


COPIES = {
    "subclass": (Subclass, "soft-moe-pytorch"),
    "copy of soft-moe": (lambda: of_soft_moe(copied(layers, "SoftMoELayerWrapper")), "soft-moe"),
    "copy without normalisation": (lambda: copied(layers, "SoftMoELayerWrapper")(D, 4, 2, Mlp, False), "soft-moe"),
    "subclass of soft-moe": (lambda: of_soft_moe(type("Mine", (layers.SoftMoELayerWrapper,), {})), "soft-moe"),
    "subclass of soft-mixture-of-experts": (
        lambda: of_fkodom(type("Mine", (pytest.importorskip("soft_mixture_of_experts.soft_moe").SoftMoE,), {})),
        "soft-mixture-of-experts",
    ),
}


@pytest.mark.parametrize(("make", "library"), COPIES.values(), ids=COPIES)
def test_subclasses_and_copies_are_layers_of_their_library(make, library):
    theirs = randomized(Net(make())).double()
    with torch.no_grad():
        expected = theirs(images())
    model = adopt(theirs, SHAPE)
    assert [layer.library for layer in model.config.layers.values()] == ["soft-moe-pytorch", library]
    assert relative_error(model(images()), expected) < 1e-9


OTHERS = {
    "residual": (Residual, "layer `layers.1`, a Residual, has the tensors of soft-moe-pytorch's layer"),
    "pair": (Pair, "layer `layers.1` gives a tuple, expected a tensor"),
    "other": (Other, "`layers.1` (a Other) in Net looks like a Soft MoE layer"),
    "bias": (Bias, "`layers.1` (a Bias) in Net looks like a Soft MoE layer"),
    "softmax over the batch": (
        lambda: of_soft_moe(copied(layers, "SoftMoELayerWrapper", **{"softmax(logits, dim=1)": "logits.softmax(0)"})),
        "layer `layers.1`, a SoftMoELayerWrapper, has the tensors of soft-moe's layer and computes something else",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_other_layers_are_errors_unless_they_are_ignored(make, message):
    with pytest.raises(MoepruneError, match=re.escape(message)) as caught:
        adopt(Net(make()), SHAPE)
    assert "`--ignore-layer layers.1`" in caught.value.hint
    if make is not Pair:  # which no sum takes
        theirs = Net(make())
        expected = theirs(images(dtype=torch.float32))
        model = adopt(theirs, SHAPE, ignore_layers=["layers.1"])
        assert list(model.moe_layers) == ["module.layers.0"]
        assert relative_error(model(images(dtype=torch.float32)), expected) < 1e-5


def test_lookalikes_are_named_where_no_layer_is_known():
    net = Net(nn.Identity())
    net.layers[0] = Other()
    with pytest.raises(MoepruneError, match=r"`layers\.0` \(a Other\) in Net looks like"):
        adopt(net, SHAPE)
    with pytest.raises(MoepruneError, match="no MoE layer of a known library in Net"):
        adopt(net, SHAPE, ignore_layers=["layers.0"])
    with pytest.raises(MoepruneError, match=r"no layer `layers\.7` to ignore in Net"):
        adopt(net, SHAPE, ignore_layers=["layers.7"])


def test_an_ignored_layer_stays_in_the_files(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(randomized(Net(Residual())).state_dict(), "net.pt")
    (tmp_path / "net_with_other.py").write_text(
        "from tests.test_lookalikes import Net, Residual\ndef build(): return Net(Residual())\n"
    )
    given = ["net.pt", "--model", "net_with_other.py:build", "--input-shape", "3,8,8"]
    assert "--ignore-layer layers.1" in run("inspect", *given).stderr
    method = ["--keep", "1/2", "--signal", "random", "--compensate", "renorm", "-o", "pruned.safetensors"]
    found = run("prune", *given, "--ignore-layer", "layers.1", *method)
    assert found.code == 0, found.stderr
    pruned = moeprune.load("pruned.safetensors", lambda: Net(Residual()))
    assert type(pruned.module.layers[1]).__name__ == "Residual"
