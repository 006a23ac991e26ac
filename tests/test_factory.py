"""Functions of the user's own code, named by a module or by a file."""

import sys
from pathlib import Path

import pytest
import torch

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models.adopted import build

NET = """
from torch import nn
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from {beside} import WIDTH

def build():
    layer = SoftMoE(SoftMoEConfig(4, 3, 1, WIDTH))
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 4)), layer, nn.Flatten(), nn.Linear(16, 3))
"""
X = torch.randn(2, 1, 4, 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with `net.py`, the same in a folder below, in a package, and under the name of another module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for place, width in {"net": 5, "below/net": 6, "package/inner/net": 7, "below/json": 8}.items():
        file = tmp_path / f"{place}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        beside = f"beside_{width}"
        (file.parent / f"{beside}.py").write_text(f"WIDTH = {width}")
        file.write_text(NET.format(beside="." * ("package" in place) + beside))
    for package in ("package", "package/inner"):
        (tmp_path / package / "__init__.py").touch()
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "stored", "width"),
    [
        ("net:build", "net:build", 5),
        ("./net.py:build", "net.py:build", 5),
        ("below/../net:build", "net:build", 5),
        ("below/net.py:build", "below/net.py:build", 6),
        ("below/net:build", "below/net:build", 6),
        ("{here}/below/net.py:build", "{here}/below/net.py:build", 6),
        ("package.inner.net:build", "package.inner.net:build", 7),
        ("package/inner/net.py:build", "package/inner/net.py:build", 7),
        ("below/json.py:build", "below/json.py:build", 8),
    ],
)
def test_a_file_or_a_module_builds_a_model_that_loads_again(name, stored, width, folder, run_json):
    name, stored = name.format(here=folder), stored.format(here=folder)
    if width != 5:  # a file of the same name was imported before
        build("net:build", {})
    torch.save(build(name, {}).state_dict(), "theirs.pt")
    found = run_json("inspect", "theirs.pt", "--model", name, "--input-shape", "1,4,4")
    assert found["architecture"]["factory"] == stored
    model = moeprune.load("theirs.pt", name, input_shape=(1, 4, 4))
    [layer] = model.moe_layers.values()
    assert layer.config.hidden_dim == width
    moeprune.save(model, "ours.safetensors")
    for again in {stored, name}:
        torch.testing.assert_close(moeprune.load("ours.safetensors", again)(X), model(X))


def test_a_file_may_have_moved_but_not_be_another(folder):
    module = build("below/net.py:build", {})
    moeprune.save(moeprune.adopt(module, (1, 4, 4), "below/net.py:build"), "ours.safetensors")
    Path("below").rename("elsewhere")
    assert moeprune.load("ours.safetensors", "elsewhere/net.py:build").moe_layers
    with pytest.raises(MoepruneError, match=r"given is `package/inner/other\.py:build`"):
        moeprune.load("ours.safetensors", "package/inner/other.py:build")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.py", "`--model net.py` is not a factory"),
        ("./net.py:", "is not a factory"),
        (":build", "is not a factory"),
        ("none.py:build", r"no file `.*none\.py`"),
        ("below:build", "AttributeError"),
        ("below/:build", r"no file `.*below\.py`"),
        ("net.py:missing", "`--model net.py:missing` fails: AttributeError"),
        ("broken.py:build", "`--model broken.py:build` fails: ZeroDivisionError"),
    ],
)
def test_what_is_no_factory(name, message, folder):
    Path("broken.py").write_text("1 / 0")
    for _ in range(2):  # nothing of a failed import remains
        with pytest.raises(MoepruneError, match=message):
            build(name, {})


def test_the_first_parameter_may_be_of_integers(folder):
    module = build("net:build", {})
    integers = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    module[0].register_parameter("codes", integers)
    model = moeprune.adopt(module, (1, 4, 4))
    assert next(model.parameters()) is integers
    expected = model(X)
    torch.testing.assert_close(moeprune.Runtime("cpu").forward(model, X.double()), expected)
