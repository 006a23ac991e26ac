"""Layers that see windows, frames or flips of an input, folded into the batch."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models.adopted import adopt
from moeprune.pruning.prune import prune
from tests.test_adopted import CLASSES, CPU, SHAPE, D, dataset, images, lucidrains, randomized
from tests.test_cost import counted
from tests.test_soft_moe import relative_error

static = partial(lucidrains.SoftMoE, D, num_experts=8, num_slots=1)
dynamic = partial(lucidrains.DynamicSlotsSoftMoE, D, num_experts=8)


class Folded(nn.Module):
    """Soft MoE layers on parts of the tokens of an image, or on several versions of it."""

    def __init__(self, how: str, layer: Callable[[], nn.Module]):
        super().__init__()
        self.how, self.embed, self.head = how, nn.Conv2d(3, D, 2, 2), nn.Linear(D, CLASSES)
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        image = self.embed(x)  # (b,d,4,4)
        b, t = len(x), image.flatten(2).mT
        if self.how in ("windows", "shuffled"):
            t = t.reshape(4 * b, 4, D)
            t = t if self.how == "windows" else t[torch.arange(4 * b) * 3 % (4 * b)]
        elif self.how == "flips":  # the first of all inputs, then the second
            t = torch.cat([t, 2 * t.flip(1)])
        elif self.how == "images":
            t = torch.stack([image, 2 * image.flip(2)], 1).flatten(0, 1)
        elif self.how == "transposed":
            t = t.transpose(0, 1)
        elif self.how == "joined":
            t = t.reshape(1, -1, D)
        for layer in self.layers:
            t = t + layer(t)
        if self.how == "flips":
            return self.head(t.unflatten(0, (2, b)).mean((0, 2)))
        t = t.flatten(2).mT if t.ndim == 4 else t
        return self.head(t.reshape(b, -1, D).mean(1))


def folded(how: str, layer: Callable[[], nn.Module] = static) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Folded(how, layer))


ways = pytest.mark.parametrize(("how", "windows"), [("windows", 4), ("flips", 2), ("images", 2)])


@ways
@pytest.mark.parametrize("layer", [static, dynamic])
def test_a_model_with_windows_computes_what_its_library_does(how, windows, layer):
    theirs = folded(how, layer).double()
    with torch.no_grad():
        expected = theirs(images())
    model = adopt(theirs, SHAPE)
    assert relative_error(model(images()), expected) < 1e-9
    assert [config.windows for config in model.config.moe_layers.values()] == [windows] * 2


@ways
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
def test_windows_are_counted_and_share_the_experts_of_their_input(how, windows, scope):
    model, data = adopt(folded(how), SHAPE), dataset()
    analysis = moeprune.analyze(model, data, CPU)
    for statistics in analysis.layers.values():
        assert float(statistics.mean_mass.sum()) == pytest.approx(1)
        assert statistics.class_mass.sum(1).tolist() == pytest.approx([1] * CLASSES)
    x = images(5, dtype=torch.float32)
    for compensate in ("none", "lstsq"):
        pruned = prune(model, analysis, keep=2, scope=scope, compensate=compensate, data=data, runtime=CPU)
        for one in (model, pruned):
            assert one.cost().flops_per_input.total == counted(one, x[:1])
        seen = []
        for layer in pruned.moe_layers.values():
            layer.observer = seen.append
        together = pruned(x)
        assert [len(found.mass) for found in seen] == [5, 5]
        assert all(found.mass.sum(1).tolist() == pytest.approx([1] * 5) for found in seen)
        if scope == "input":
            of_inputs = [found.chosen.unflatten(0, (5, windows)) for found in seen]
            assert all((chosen == chosen[:, :1]).all() for chosen in of_inputs)
            assert any((chosen != chosen[:1]).any() for chosen in of_inputs)
        if scope != "batch":
            assert relative_error(torch.cat([pruned(x[i : i + 1]) for i in range(5)]), together) < 1e-5


@pytest.mark.parametrize("compensate", ["affine", "refit", "renorm-refit", "low-rank"])
def test_fits_over_windows_lower_the_error(compensate):
    model, data = adopt(folded("windows"), SHAPE), dataset(60)
    pruned = {name: prune(model, keep=2, signal="random", compensate=name, data=data, runtime=CPU)
              for name in ("none", compensate)}  # fmt: skip
    x = torch.cat([inputs for inputs, _ in data.batches(60)])
    errors = {name: relative_error(one(x), model(x)) for name, one in pruned.items()}
    assert errors[compensate] < 0.8 * errors["none"]


@ways
def test_a_mass_is_reached_over_all_windows_of_an_input(how, windows):
    model = adopt(folded(how, dynamic), SHAPE)
    found = moeprune.evaluate(prune(model, mass=0.6, scope="input", compensate="none"), dataset(), model, CPU)
    assert 1 <= found.model.experts_per_input / 2 < 8
    assert found.difference.flops_reduction > 0.05


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("transposed", "sees 16 × 1 tokens of one input of the model and 16 × 2 of two"),
        ("joined", "sees 1 × 16 tokens of one input of the model and 1 × 32 of two"),
        ("shuffled", "sees 4 × 4 tokens of one input of the model and 8 × 4 of two"),
    ],
)
def test_layers_that_mix_inputs_are_refused(how, message):
    with pytest.raises(MoepruneError, match=f"layer `layers.0` {message}: it is not clear which"):
        adopt(folded(how), SHAPE)


def test_a_number_of_windows_that_changes_is_an_error():
    model = adopt(folded("windows"), SHAPE)
    model.module.how = "images"
    with pytest.raises(MoepruneError, match="6 windows, expected a multiple of 4"):
        model(images(3, dtype=torch.float32))
    with pytest.raises(MoepruneError, match="sees 1 inputs where the model has 2"):
        moeprune.analyze(model, dataset(2), CPU)


def test_windows_are_in_the_file(tmp_path):
    model = adopt(folded("flips"), SHAPE, partial(folded, "flips"))
    moeprune.save(model, tmp_path / "model.safetensors")
    again = moeprune.load(tmp_path / "model.safetensors", partial(folded, "flips"))
    assert again.config == model.config
    assert all(layer.interleaved for layer in again.config.moe_layers.values())
