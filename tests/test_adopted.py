"""Models of the user's own code with Soft MoE layers of other libraries."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.cli import app
from moeprune.cli.options import parse_settings
from moeprune.data.datasets import Dataset, from_tensors
from moeprune.errors import MoepruneError
from moeprune.files.header import read_header
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.adopted import AdoptedModel, adopt, build
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.export import to_module
from moeprune.models.libraries.layers import LAYERS
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.pruning.prune import prune
from tests.test_cost import counted
from tests.test_soft_moe import relative_error

lucidrains = pytest.importorskip("soft_moe_pytorch")
fkodom = pytest.importorskip("soft_mixture_of_experts.vit")

SHAPE, CLASSES, D = (3, 8, 8), 5, 12
CPU = Runtime("cpu")


@pytest.fixture(autouse=True)
def _same_weights_in_every_run():
    torch.manual_seed(0)


class Tower(nn.Module):
    """Patches, then Soft MoE layers with residuals on tokens, on an image, and on one token."""

    def __init__(self, layer: Callable[[], nn.Module], late: nn.Module | None = None):
        super().__init__()
        self.embed = nn.Conv2d(3, D, 2, 2)
        self.norm = nn.BatchNorm2d(D)  # has an integer buffer
        self.late = late or layer()  # runs after the other two
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        image = self.norm(self.embed(x))
        image = image + self.layers[0](image)
        tokens = image.flatten(2).mT
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        mask[:, 12:] = False
        tokens = tokens + self.layers[1](tokens, mask)
        token = tokens[:, :12].mean(1)
        return self.head(token + self.late(token))


def tower(num_experts=4, **options) -> nn.Module:
    return Tower(partial(lucidrains.SoftMoE, D, num_slots=2, num_experts=num_experts, expert_mult=2, **options))


def dynamic(num_experts=4, **options) -> nn.Module:
    """Without the layer on one token, which layers with dynamic slots do not take."""
    layer = partial(lucidrains.DynamicSlotsSoftMoE, D, num_experts=num_experts, expert_mult=2, **options)
    return Tower(layer, nn.Linear(D, D))


def encoder(num_experts=4) -> nn.Module:
    return fkodom.SoftMoEViT(
        num_classes=CLASSES, image_size=8, patch_size=4, d_model=D, dim_feedforward=16, nhead=2,
        num_encoder_layers=2, num_experts=num_experts, slots_per_expert=2,
    )  # fmt: skip


STATIC = [
    *((tower, {"geglu": geglu, "use_layernorm": norm}) for geglu, norm in product((False, True), repeat=2)),
    (encoder, {}),
]
DYNAMIC = [  # 16 tokens: with 4 experts none is left over, with 5 some are
    (dynamic, {"geglu": geglu, "num_experts": n}) for geglu, n in product((False, True), (4, 5))
]
every_case = pytest.mark.parametrize(("factory", "arguments"), STATIC + DYNAMIC)


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.uniform_(0.5, 3, generator=generator)
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(count=6, seed=1, dtype=torch.float64) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dataset(count=20) -> Dataset:
    inputs, labels = images(count, 3, torch.float32), torch.arange(count) % CLASSES
    return from_tensors("memory", inputs, labels, CLASSES)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@every_case
def test_adopted_models_compute_what_their_libraries_do(factory, arguments, dtype, tolerance):
    theirs = randomized(factory(**arguments)).to(dtype)
    with torch.no_grad():
        expected = theirs(images(dtype=dtype))
    model = adopt(theirs, SHAPE)
    assert relative_error(model(images(dtype=dtype)), expected) < tolerance
    others = [library for name, library in LAYERS.items() if name != "moeprune"]
    assert not any(library.recognises(module) for module in model.modules() for library in others)


def test_layers_are_named_in_the_order_in_which_they_run():
    model = adopt(randomized(tower()), SHAPE)
    assert list(model.moe_layers) == ["module.layers.0", "module.layers.1", "module.late"]
    assert [layer.tokens for layer in model.config.layers.values()] == [16, 16, 1]


@pytest.mark.parametrize(("factory", "arguments"), STATIC)
def test_statically_pruned_models_compute_what_the_library_does_with_fewer_experts(factory, arguments):
    model = adopt(randomized(factory(**arguments)).double(), SHAPE)
    pruned = prune(model, keep=2, signal="random", compensate="renorm")
    smaller = factory(**arguments, num_experts=2).double().eval()
    smaller.load_state_dict(to_module(pruned, factory(**arguments)), strict=True)
    assert relative_error(smaller(images()), pruned(images())) < 1e-9


@every_case
def test_tensors_go_back_as_they_came(factory, arguments):
    theirs = randomized(factory(**arguments))
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    tensors = to_module(adopt(theirs, SHAPE), factory(**arguments))
    assert set(tensors) == set(before)
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("compensate", ["none", "renorm", "mean", "lstsq"])
@pytest.mark.parametrize("scope", ["static", "input", "batch"])
@pytest.mark.parametrize("factory", [tower, encoder, dynamic])
def test_adopted_models_are_analyzed_pruned_and_evaluated(factory, scope, compensate):
    if factory is dynamic and scope == "static":
        pytest.skip("refused, see below")
    model = adopt(randomized(factory()), SHAPE)
    before = model(images(dtype=torch.float32))
    data = dataset()
    analysis = moeprune.analyze(model, data, CPU)
    pruned = prune(model, analysis, keep=2, scope=scope, compensate=compensate, data=data, runtime=CPU)
    found = moeprune.evaluate(pruned, data, model, CPU)
    assert torch.equal(model(images(dtype=torch.float32)), before)
    assert found.model.experts_per_input == 2 * len(model.config.layers)
    assert found.difference.flops_reduction > 0 or compensate in ("mean", "lstsq")
    assert (found.difference.size_reduction > 0) == (scope == "static")


class Masked(nn.Module):
    """An expert that gives something for some inputs only."""

    def __init__(self, expert: Callable[[Tensor], Tensor], inputs: Tensor):
        super().__init__()
        self.expert, self.inputs = expert, inputs

    def forward(self, slots: Tensor) -> Tensor:
        return self.expert(slots) * self.inputs[:, None, None]


@pytest.mark.parametrize("num_experts", [4, 5])
@pytest.mark.parametrize("scope", ["input", "batch"])
@torch.no_grad()
def test_dynamic_slots_are_routed_to_the_experts_of_most_mass(scope, num_experts):
    k, b, m = 2, 6, 14
    theirs = nn.Sequential(lucidrains.DynamicSlotsSoftMoE(D, num_experts=num_experts), nn.Flatten())
    randomized(theirs).double()
    layer = theirs[0]
    x = torch.randn(b, D, 2, m // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    experts = list(layer.experts)
    mass = []
    for running in range(num_experts):  # with outputs of one the library's output is the mass
        for j in range(num_experts):
            layer.experts[j] = Masked(torch.ones_like, torch.full((b,), float(j == running)).double())
        mass.append(layer(x)[:, 0].mean((1, 2)))
    scores = torch.stack(mass, 1)
    assert torch.allclose(scores.sum(1), torch.ones(b, dtype=torch.float64))
    if scope == "batch":
        scores = scores.sum(0, keepdim=True).expand_as(scores)
    chosen = scores.topk(k, dim=1).indices
    for j in range(num_experts):
        layer.experts[j] = Masked(experts[j], (chosen == j).any(1).double())
    expected = theirs(x)
    for j in range(num_experts):
        layer.experts[j] = experts[j]
    pruned = prune(adopt(theirs, (D, 2, m // 2)), keep=k, scope=scope, signal="combine", compensate="none")
    assert relative_error(pruned(x), expected) < 1e-9


def test_dispatch_over_the_batch_where_the_user_names_the_release(monkeypatch):
    theirs = randomized(encoder()).double()
    softmax = Tensor.softmax
    model = adopt(copy.deepcopy(theirs), SHAPE, source="soft-mixture-of-experts==0.1.0")
    assert {layer.dispatch_over for layer in model.config.moe_layers.values()} == {"batch"}
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: softmax(x, dim=0 if dim == 1 else dim))
    expected = theirs(images())
    monkeypatch.undo()
    assert relative_error(model(images()), expected) < 1e-9
    everything = prune(model, keep=4, scope="input", signal="combine", compensate="none")
    assert relative_error(everything(images()), expected) < 1e-9
    assert relative_error(model(images()[:3]), expected[:3]) > 1e-3


def test_flops_of_an_adopted_model_equal_what_torch_counts():
    model = adopt(randomized(encoder()), SHAPE)
    for one in (model, prune(model, keep=2, signal="random", compensate="renorm")):
        assert one.cost().flops_per_input.total == counted(one, images(1, dtype=torch.float32))


def own_tower(num_experts=4) -> nn.Module:
    return Tower(lambda: SoftMoE(SoftMoEConfig(D, num_experts, 2, 24)))


def test_layers_of_our_own_in_a_model_of_the_users(tmp_path):
    theirs = randomized(own_tower())
    expected = theirs(images(dtype=torch.float32))
    torch.save(theirs.state_dict(), tmp_path / "trained.pt")
    model = moeprune.load(tmp_path / "trained.pt", own_tower, input_shape=SHAPE)
    assert model.reading.library == "moeprune"
    assert model.reading.parity.max_relative_difference < 1e-12
    assert torch.equal(model(images(dtype=torch.float32)), expected)
    pruned = prune(model, keep=2, signal="random", compensate="renorm")
    moeprune.export(pruned, tmp_path / "small.pt", "moeprune")
    smaller = own_tower(num_experts=2).eval()
    smaller.load_state_dict(torch.load(tmp_path / "small.pt"), strict=True)
    assert relative_error(smaller(images(dtype=torch.float32)), pruned(images(dtype=torch.float32))) < 1e-5
    with pytest.raises(MoepruneError, match=r"layer `module\.layers\.0` is already pruned"):
        adopt(pruned, SHAPE)


def test_hooks_that_are_lost_with_a_layer_are_warned_of(caplog):
    adopt(randomized(own_tower()), SHAPE)
    assert "output changes" not in caplog.text
    theirs = randomized(own_tower())
    theirs.layers[0].register_forward_hook(lambda layer, taken, output: 0.5 * output)
    adopt(theirs, SHAPE)
    assert "the model's output changes by" in caplog.text


def test_products_in_threads_are_not_counted(caplog):
    class Threaded(Tower):
        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(super().forward, x).result()

    model = adopt(randomized(Threaded(lambda: SoftMoE(SoftMoEConfig(D, 4, 2, 24)))), SHAPE)
    assert model.config.other_flops == 0
    assert "FLOPs of all but the MoE layers cannot be counted" in caplog.text


# --- files
@pytest.fixture
def package(tmp_path, monkeypatch):
    """The factories above as a module that can be imported by name."""
    failing = {"broken": lambda: 1 / 0, "none": lambda: None}
    module = SimpleNamespace(tower=tower, encoder=encoder, dynamic=dynamic, **failing)
    monkeypatch.setitem(sys.modules, "user_models", module)
    monkeypatch.chdir(tmp_path)
    return "user_models"


@pytest.mark.parametrize("compensate", ["renorm", "mean"])
@pytest.mark.parametrize("scope", ["static", "input"])
def test_saved_models_are_loaded_with_their_factory_again(package, tmp_path, scope, compensate):
    arguments = {"geglu": True, "use_layernorm": True}
    model = adopt(randomized(tower(**arguments)), SHAPE, f"{package}:tower", arguments)
    pruned = prune(model, keep=2, scope=scope, compensate=compensate, data=dataset(), runtime=CPU)
    for which, one in {"full": model, "pruned": pruned}.items():
        path = tmp_path / f"{which}.safetensors"
        moeprune.save(one, path)
        loaded = moeprune.load(path, f"{package}:tower")
        assert isinstance(loaded, AdoptedModel)
        assert torch.equal(loaded(images(dtype=torch.float32)), one(images(dtype=torch.float32)))
        again = tmp_path / "again.safetensors"
        moeprune.save(loaded, again, overwrite=True)
        assert again.read_bytes() == path.read_bytes()
        assert "module.norm.num_batches_tracked" in read_header(path).tensors


def test_a_factory_that_changed_is_an_error_that_lists_all_differences(package, tmp_path):
    path = tmp_path / "model.safetensors"
    model = adopt(randomized(tower()), SHAPE, f"{package}:tower")
    model.module.extra = nn.Linear(2, 2)
    del model.module.head
    moeprune.save(model, path)
    expected = (
        r"missing `module\.head\.bias`; missing `module\.head\.weight`;"
        r" unexpected `module\.extra\.bias`; unexpected `module\.extra\.weight`"
    )
    with pytest.raises(MoepruneError, match=expected):
        moeprune.load(path, f"{package}:tower")


def test_keys_of_old_releases_are_read(tmp_path):
    theirs = randomized(tower())
    old = {name.replace("experts.experts.", "experts."): t for name, t in theirs.state_dict().items()}
    torch.save(old, tmp_path / "old.pt")
    model = moeprune.load(tmp_path / "old.pt", tower, input_shape=SHAPE)
    assert relative_error(model(images(dtype=torch.float32)), theirs(images(dtype=torch.float32))) < 1e-5


@pytest.mark.parametrize("compensate", ["renorm", "mean"])
def test_a_training_checkpoint_is_opened_pruned_and_given_back(package, tmp_path, compensate):
    theirs = randomized(tower(geglu=True))
    weights = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "model": weights, "ema": weights}, "trained.pt")
    for factory in (f"{package}:tower", tower):
        full = moeprune.load("trained.pt", factory, input_shape=SHAPE, key="model", geglu=True)
        assert full.reading.library == full.details.source["library"] == "soft-moe-pytorch"
        assert full.reading.arguments == full.config.arguments == {"geglu": True}
        assert full.reading.parity.max_relative_difference < 1e-9
    assert full.config.factory == "tests.test_adopted:tower"
    moeprune.export(full, "back.pt", "soft-moe-pytorch")
    back = torch.load("back.pt")
    assert all(torch.equal(back[key.removeprefix("module.")], value) for key, value in weights.items())
    pruned = prune(full, keep=2, compensate=compensate, data=dataset(), runtime=CPU)
    moeprune.save(pruned, "pruned.safetensors")
    again = moeprune.load("pruned.safetensors", tower)
    x = images(dtype=torch.float32)
    assert torch.equal(again(x), pruned(x))
    if compensate == "renorm":
        found = moeprune.export(again, "small.pt", "soft-moe-pytorch")
        assert found.parity.max_relative_difference < 1e-9
        assert found.arguments == {}
        smaller = tower(geglu=True, num_experts=2).eval()
        smaller.load_state_dict(torch.load("small.pt"), strict=True)
        assert relative_error(smaller(x).detach(), pruned(x)) < 1e-5
    else:
        with pytest.raises(MoepruneError, match=r"layer `module\.late` has compensation mean"):
            moeprune.export(pruned, "small.pt", "soft-moe-pytorch")
        assert not (tmp_path / "small.pt").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_model_adopted_without_a_factory_is_loaded_with_one(suffix, tmp_path):
    path, x = tmp_path / f"adopted{suffix}", images(dtype=torch.float32)
    model = adopt(randomized(tower(geglu=True)), SHAPE)
    moeprune.save(model, path)
    with pytest.raises(MoepruneError, match=r"does not say which function builds the model\n\nhint: .*`model=build`"):
        moeprune.load(path)
    assert torch.equal(moeprune.load(path, model=lambda: tower(geglu=True))(x), model(x))
    with pytest.raises(MoepruneError, match=r"without a layer|does not fit"):
        moeprune.load(path, model=encoder)


def test_a_model_of_a_release_that_is_not_installed(package):
    torch.save(randomized(encoder()).state_dict(), "trained.pt")
    source = "soft-mixture-of-experts==0.1.0"
    model = moeprune.load("trained.pt", f"{package}:encoder", input_shape=SHAPE, source=source)
    assert model.reading.parity.skipped == "`soft-mixture-of-experts` 0.2.0 is installed, not 0.1.0"
    assert model.details.source["version"] == "0.1.0"


# --- bad input
def test_static_pruning_of_dynamic_slots_is_refused_with_the_reason():
    model = adopt(randomized(dynamic()), SHAPE)
    with pytest.raises(MoepruneError, match="makes its slots anew from each input's tokens") as caught:
        prune(model, keep=2, scope="static", signal="random", compensate="renorm")
    assert "with scope input or batch only" in caught.value.message


def with_part(model: nn.Module, name: str, part: object) -> nn.Module:
    """The model with something else as one of its parts."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, part)
    return model


def running_twice() -> nn.Module:
    model = tower()
    head = model.head
    model.head = nn.Sequential(nn.Identity(), head)
    model.head.forward = lambda x: head(x + model.late(x))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(3, 3), "no MoE layer of a known library in Linear"),
        (lambda: nn.Sequential(lucidrains.SoftMoE(3, num_slots=1)), r"gives \[1, 3, 8, 8\] for 1 input"),
        (lambda: nn.Sequential(lucidrains.SoftMoE(4, num_slots=1)), "fails on an input of shape"),
        (
            lambda: with_part(tower(), "late.experts.experts.2.1", nn.ReLU()),
            r"late\.experts\.experts\.2`, a .*ReLU.*, does not compute what `late\.experts\.experts\.0` does",
        ),
        (lambda: with_part(tower(use_layernorm=True), "late.norm.beta", torch.ones(D)), "layer `late` has a `beta`"),
        (lambda: (one := tower()) and with_part(one, "late", one.layers[0]), "`late` runs more than once"),
        (running_twice, "`late` runs more than once"),
    ],
)
def test_models_that_do_not_fit(make, message):
    with pytest.raises(MoepruneError, match=message):
        adopt(make(), SHAPE)


def test_the_layer_may_be_all_but_a_reshape():
    model = nn.Sequential(nn.Flatten(), lucidrains.SoftMoE(192, num_slots=1))
    assert adopt(model, SHAPE).config.num_classes == 192


FAILING = {
    "nonsense": "is not a factory", "no_such_package:f": "ModuleNotFoundError", "user_models:missing": "AttributeError",
    "user_models:broken": "ZeroDivisionError", "user_models:none": "builds a NoneType",
}  # fmt: skip


@pytest.mark.parametrize(("factory", "message"), FAILING.items())
def test_factories_that_fail(package, factory, message):
    with pytest.raises(MoepruneError, match=message):
        build(factory, {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("1e-6", 1e-6), ("avg", "avg"), ("'none'", "none"), ("none", None), ("null", None),
        ("True", True), ("false", False), ("3,8,8", (3, 8, 8)), ("(16, [1])", (16, [1])), ("[1, true]", [1, True]),
        ("192x256", "192x256"), ("", ""), ("''", ""),
        ("{'a': (1, 2)}", {"a": (1, 2)}), ("007", "007"), ("nan", "nan"),
    ],
)  # fmt: skip
def test_values_are_read_in_the_spelling_of_python_or_json(text, value):
    found = parse_settings([f"key={text}"], "--model-arg")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("texts", [["x"], ["=2"], ["1x=2"], ["x=1", "x=2"], ["x={1}"], ["x=1e999"]])
def test_settings_that_are_wrong(texts):
    with pytest.raises(MoepruneError, match="--model-arg"):
        parse_settings(texts, "--model-arg")


TRAINED = {"model": tower, "input_shape": SHAPE, "geglu": True}
ALONE = dict.fromkeys(TRAINED)
WRONG = [
    ("trained.pt", {"input_shape": None}, r"input_shape=\(3, 224, 224\)"),
    ("trained.pt", {"input_shape": (3, 8)}, "`input_shape`: expected"),
    ("trained.pt", {"input_shape": (3, 2**20, 2**20)}, "expected at most"),
    ("trained.pt", {"input_shape": (1, 8, 8)}, "fails on an input of shape"),
    ("trained.pt", {"geglu": False}, r"`late\.experts.*; 33 more of another shape"),
    ("trained.pt", {"shape": 3}, "TypeError"),
    ("trained.pt", {"model": None, "geglu": None}, "go with `model`"),
    ("trained.pt", {"source": "soft-moe"}, "not from `soft-moe`"),
    ("trained.pt", {"source": "vmoe"}, "`source` is 'vmoe', expected one of"),
    ("trained.pt", {"source": "soft-moe==x"}, "names no release"),
    ("trained.pt", {"key": "ema"}, "ema"),
    ("full.safetensors", {}, "is a checkpoint of moeprune and takes no `arguments`, `input_shape`"),
    ("full.safetensors", ALONE, "add `model=.tests.test_adopted:tower"),
    ("full.safetensors", ALONE | {"model": "user_models:encoder"}, "given is `user_models:encoder`"),
    ("vit.safetensors", ALONE | {"model": tower}, "needs no `model`"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory, single):
    folder = tmp_path_factory.mktemp("files")
    model = randomized(tower(geglu=True))
    torch.save(model.state_dict(), folder / "trained.pt")
    moeprune.save(adopt(model, SHAPE, tower, {"geglu": True}), folder / "full.safetensors")
    shutil.copy(single, folder / "vit.safetensors")
    return folder


@pytest.mark.parametrize(("name", "changed", "message"), WRONG)
def test_calls_that_are_wrong(name, changed, message, files):
    said = {key: value for key, value in (TRAINED | changed).items() if value is not None}
    with pytest.raises(MoepruneError, match=message):
        moeprune.load(files / name, **said)


@pytest.mark.parametrize(("make", "library"), [(tower, "soft-moe-pytorch"), (encoder, "soft-mixture-of-experts")])
def test_files_of_layers_alone_are_told_by_name(make, library, tmp_path):
    torch.save(make().state_dict(), tmp_path / "x.pt")
    with pytest.raises(MoepruneError, match=f"belongs to a layer of {library}"):
        moeprune.load(tmp_path / "x.pt")


def test_what_cannot_be_exported(files):
    full = moeprune.load(files / "full.safetensors", tower)
    with pytest.raises(MoepruneError, match="exported to `soft-moe`"):
        moeprune.export(full, files / "x.pt", "soft-moe")
    with pytest.raises(MoepruneError, match="not known what builds the model"):
        moeprune.export(adopt(tower(), SHAPE), files / "x.pt", "soft-moe-pytorch")
    for scope, compensate in (("input", "none"), ("static", "none"), ("static", "mean")):
        pruned = prune(full, keep=2, scope=scope, compensate=compensate, data=dataset(), runtime=CPU)
        with pytest.raises(MoepruneError, match=f"scope {scope}|compensation {compensate}"):
            moeprune.export(pruned, files / "x.pt", "soft-moe-pytorch")
    assert not (files / "x.pt").exists()


def test_a_checkpoint_with_other_dynamic_slots_than_its_tokens_make_is_refused(tmp_path):
    soft_moe = SoftMoEConfig(8, 4, 5, 6, router_norm="none", dynamic_slots=True)
    config = ViTConfig((8, 8), (2, 2), 1, 3, dim=8, num_heads=2, blocks=(BlockConfig(soft_moe=soft_moe),))
    model = SoftMoEViT(config)
    moeprune.save(model, tmp_path / "model.safetensors")
    with pytest.raises(MoepruneError, match="computes with 20 tokens, its inputs have 16"):
        moeprune.load(tmp_path / "model.safetensors")


# --- code of the user's that prints, ends the program, or fails
HOSTILE = """
import os, subprocess, sys, torch
from tests.test_adopted import Tower, tower as plain
{at_import}

class Net(type(plain())):
    def forward(self, x):
        {in_forward}
        return super().forward(x)

def build():
    {in_factory}
    model = plain()
    model.__class__ = Net
    return model
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch, files):
    """Write a module with code at import, in the factory and in forward; its name changes each time."""
    monkeypatch.chdir(tmp_path)
    torch.save(randomized(tower()).state_dict(), "net.pt")
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    np.savez("data.npz", inputs=inputs.numpy(), labels=[0, 1, 2, 3])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(**code: str) -> list[object]:
        places = dict.fromkeys(("at_import", "in_factory", "in_forward"), "pass")
        name = f"hostile_{abs(hash(tuple(code.items())))}"
        (tmp_path / f"{name}.py").write_text(HOSTILE.format(**places | code))
        return ["net.pt", "--model", f"{name}:build", "--input-shape", "3,8,8"]

    return write


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("sys.exit(0)", r"`--model hostile_\d+:build` .*`sys.exit\(0\)`"),
        ("sys.exit('no GPU')", r"hostile_\d+:build.*'no GPU'"),
        ("raise BaseException('odd')", r"hostile_\d+:build.*BaseException: odd"),
        ("import argparse; argparse.ArgumentParser().parse_args(); print(1 / 0)", "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("place", ["at_import", "in_factory", "in_forward"])
def test_whatever_code_of_the_users_raises_is_an_error_that_names_it(run, hostile, place, raised, message):
    arguments = ["eval", *hostile(**{place: raised}), "--data", "data.npz", "--min-accuracy", 0.99]
    found = run(*arguments, "--output-format", "junit", "--output-file", "gates.xml")
    assert found.code == 2
    assert re.search(message, found.stderr)
    assert "<error" in Path("gates.xml").read_text()


def test_an_error_in_a_later_forward_pass_names_the_model(run, hostile):
    late = "assert len(x) != 2, 'two inputs'"
    found = run("eval", *hostile(in_forward=late), "--data", "data.npz", "--batch-size", 2)
    assert found.code == 2
    assert re.search(
        r"Net that `--model hostile_\d+:build` builds fails on .*\[2, 3, 8, 8\]: .*two inputs", found.stderr
    )


@pytest.mark.parametrize("place", ["at_import", "in_factory", "in_forward"])
def test_what_code_of_the_users_prints_stays_out_of_the_report(capfd, hostile, place):
    printing = (
        "print('said', sys.argv); print('said', file=sys.__stdout__); os.system('echo said');"
        " subprocess.run(['echo', 'said'])"
    )
    before = list(sys.argv)
    with pytest.raises(SystemExit) as ended:
        app([*map(str, ["eval", *hostile(**{place: printing}), "--data", "data.npz", "--output-format", "json"])])
    shown = capfd.readouterr()
    assert ended.value.code == 0
    assert json.loads(shown.out)["data"]["samples"] == 4
    assert shown.err.count("said") >= 4
    assert sys.argv == before


def test_what_code_of_the_users_prints_is_left_alone_in_python(capfd, hostile):
    path, _, factory, *_ = hostile(in_forward="print('said', len(sys.argv))")
    moeprune.load(path, factory, input_shape=SHAPE)
    assert f"said {len(sys.argv)}" in capfd.readouterr().out


def test_a_program_that_hides_errors_does_not_hide_the_end_of_a_pass(run, hostile):
    swallow = "\n        try: return super().forward(x)\n        except Exception: return torch.zeros(len(x), 5)"
    found = run("analyze", *hostile(in_forward=swallow), "--data", "data.npz", "-o", "a.safetensors")
    assert found.code == 0, found.stderr
