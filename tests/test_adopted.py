"""Models of the user's own code with Soft MoE layers of other libraries."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import moeprune
from moeprune.data.datasets import Dataset, from_tensors
from moeprune.errors import MoepruneError
from moeprune.files.header import read_header
from moeprune.layers.config import SoftMoEConfig
from moeprune.models import adopted
from moeprune.models.adopted import adopt
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.module import AdoptedModel, build
from moeprune.models.runtime import Runtime
from moeprune.models.vit import SoftMoEViT
from moeprune.pruning.apply import prune
from tests.test_soft_moe import relative_error

lucidrains = pytest.importorskip("soft_moe_pytorch")
fkodom = pytest.importorskip("soft_mixture_of_experts.vit")

SHAPE, CLASSES, D = (3, 8, 8), 5, 12
CPU = Runtime("cpu")


class Tower(nn.Module):
    """Patches, then Soft MoE layers with residuals on tokens, on an image, and on one token."""

    def __init__(self, layer: Callable[[], nn.Module]):
        super().__init__()
        self.embed = nn.Conv2d(3, D, 2, 2)
        self.norm = nn.BatchNorm2d(D)  # has an integer buffer
        self.late = self.layer_on_a_token(layer)  # runs after the other two
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(D, CLASSES)

    def layer_on_a_token(self, layer: Callable[[], nn.Module]) -> nn.Module:
        return layer()

    def forward(self, x: Tensor) -> Tensor:
        image = self.norm(self.embed(x))
        image = image + self.layers[0](image)
        tokens = image.flatten(2).mT
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device)
        mask[:, 12:] = False
        tokens = tokens + self.layers[1](tokens, mask)
        token = tokens[:, :12].mean(1)
        return self.head(token + self.late(token))


def tower(geglu=False, use_layernorm=False, num_experts=4) -> nn.Module:
    return Tower(
        lambda: lucidrains.SoftMoE(
            D, num_slots=2, num_experts=num_experts, expert_mult=2, geglu=geglu, use_layernorm=use_layernorm
        )
    )


class DynamicTower(Tower):
    """The same without the layer on one token, which layers with dynamic slots do not take."""

    def layer_on_a_token(self, layer: Callable[[], nn.Module]) -> nn.Module:
        return nn.Linear(D, D)


def dynamic(geglu=False, num_experts=4) -> nn.Module:
    return DynamicTower(
        lambda: lucidrains.DynamicSlotsSoftMoE(D, num_experts=num_experts, expert_mult=2, geglu=geglu)
    )


def encoder(num_experts=4) -> nn.Module:
    return fkodom.SoftMoEViT(
        num_classes=CLASSES, image_size=8, patch_size=4, d_model=D, dim_feedforward=16, nhead=2,
        num_encoder_layers=2, num_experts=num_experts, slots_per_expert=2,
    )  # fmt: skip


FACTORIES = {
    **{
        f"tower-{geglu}-{norm}": (tower, {"geglu": geglu, "use_layernorm": norm})
        for geglu, norm in product((False, True), repeat=2)
    },
    "encoder": (encoder, {}),
}
DYNAMIC = {  # 16 tokens: with 4 experts none is left over, with 5 some are
    f"dynamic-{geglu}-{n}": (dynamic, {"geglu": geglu, "num_experts": n})
    for geglu, n in product((False, True), (4, 5))
}


@pytest.fixture(params=FACTORIES | DYNAMIC)
def case(request):
    return (FACTORIES | DYNAMIC)[request.param]


@pytest.fixture(params=FACTORIES)
def static_case(request):
    return FACTORIES[request.param]


def randomized(model: nn.Module, seed=0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
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
def test_adopted_models_compute_what_their_libraries_do(case, dtype, tolerance):
    factory, arguments = case
    theirs = randomized(factory(**arguments)).to(dtype)
    with torch.no_grad():
        expected = theirs(images(dtype=dtype))
    model = adopt(theirs, SHAPE)
    assert relative_error(model(images(dtype=dtype)), expected) < tolerance
    assert not any(adopted.library_of(m) for m in model.modules() if any(
        library.recognises(m) for library in adopted.LIBRARIES
    ))  # fmt: skip


def test_layers_are_named_in_the_order_in_which_they_run():
    model = adopt(randomized(tower()), SHAPE)
    assert list(model.moe_layers) == ["module.layers.0", "module.layers.1", "module.late"]
    assert [layer.tokens for layer in model.config.layers.values()] == [16, 16, 1]


def test_statically_pruned_models_compute_what_the_library_does_with_fewer_experts(static_case):
    factory, arguments = static_case
    theirs = randomized(factory(**arguments)).double()
    model = adopt(theirs, SHAPE)
    pruned = prune(model, keep=2, signal="random", compensate="renorm")
    smaller = factory(**arguments, num_experts=2).double().eval()
    tensors = adopted.library_tensors(pruned, factory(**arguments))
    smaller.load_state_dict(tensors, strict=True)
    assert relative_error(smaller(images()), pruned(images())) < 1e-9


def test_tensors_go_back_as_they_came(case):
    factory, arguments = case
    theirs = randomized(factory(**arguments))
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    tensors = adopted.library_tensors(adopt(theirs, SHAPE), factory(**arguments))
    assert set(tensors) == set(before)
    for name, tensor in before.items():
        assert torch.equal(tensors[name], tensor), name


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
    pruned = prune(adopt(theirs, (D, 2, m // 2)), keep=k, scope=scope)
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
    everything = prune(model, keep=4, scope="input")
    assert relative_error(everything(images()), expected) < 1e-9
    assert relative_error(model(images()[:3]), expected[:3]) > 1e-3


def test_flops_of_an_adopted_model_equal_what_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    theirs = randomized(encoder())
    model = adopt(theirs, SHAPE)
    pruned = prune(model, keep=2, signal="random", compensate="renorm")
    for one in (model, pruned):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            one(images(1, dtype=torch.float32))
        assert one.cost().flops_per_input.total == counter.get_total_flops()


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The factories above as a module that can be imported by name."""
    module = type(sys)("user_models")
    module.tower, module.encoder, module.dynamic = tower, encoder, dynamic
    module.broken, module.none = lambda: 1 / 0, lambda: None
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
        moeprune.save(loaded, again)
        assert again.read_bytes() == path.read_bytes()
        assert "module.norm.num_batches_tracked" in read_header(path).tensors


@pytest.mark.parametrize("given", [None, "user_models:encoder"])
def test_loading_says_which_factory_is_needed(package, tmp_path, given):
    path = tmp_path / "model.safetensors"
    moeprune.save(adopt(randomized(tower()), SHAPE, f"{package}:tower"), path)
    with pytest.raises(MoepruneError, match=r"user_models:tower.*(none is given|given is `user_models:enc)"):
        moeprune.load(path, given)


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


def test_keys_of_old_releases_are_read():
    theirs = randomized(tower())
    expected = theirs(images(dtype=torch.float32))
    old = {name.replace("experts.experts.", "experts."): t for name, t in theirs.state_dict().items()}
    fresh = tower()
    adopted.load_foreign(fresh, old, "old.pt")
    assert torch.equal(fresh.eval()(images(dtype=torch.float32)), expected)


# --- bad input ---------------------------------------------------------------------------------


def test_static_pruning_of_dynamic_slots_is_refused_with_the_reason():
    model = adopt(randomized(dynamic()), SHAPE)
    with pytest.raises(MoepruneError, match="makes its slots anew from each input's tokens") as caught:
        prune(model, keep=2, signal="random", compensate="renorm")
    assert "with scope input or batch only" in caught.value.message


def test_experts_of_another_kind_are_refused_by_what_they_are():
    model = tower()
    model.late.experts.experts[2][1] = nn.ReLU()
    with pytest.raises(MoepruneError, match=r"late\.experts\.2` is made of .*ReLU.*: expected two linears"):
        adopt(model, SHAPE)


def test_a_beta_that_is_not_zero_is_refused():
    model = tower(use_layernorm=True)
    model.late.norm.beta += 1
    with pytest.raises(MoepruneError, match="layer `late` has a `beta`"):
        adopt(model, SHAPE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "no Soft MoE layer of a known library in Linear"),
        (nn.Sequential(nn.Flatten(), lucidrains.SoftMoE(192, num_slots=1)), None),
        (nn.Sequential(lucidrains.SoftMoE(3, num_slots=1)), r"gives \[1, 3, 8, 8\] for one input"),
        (nn.Sequential(lucidrains.SoftMoE(4, num_slots=1)), "fails on an input of shape"),
    ],
)
def test_models_that_do_not_fit(model, message):
    if message is None:
        assert adopt(model, SHAPE).config.num_classes == 192
        return
    with pytest.raises(MoepruneError, match=message):
        adopt(model, SHAPE)


def test_a_layer_that_runs_twice_is_refused():
    model = tower()
    model.late = model.layers[0]
    with pytest.raises(MoepruneError, match=r"`late` and `layers\.0` are one"):
        adopt(model, SHAPE)
    model = tower()
    head = model.head
    model.head = nn.Sequential(nn.Identity(), head)
    model.head.forward = lambda x: head(x + model.late(x))
    with pytest.raises(MoepruneError, match="`late` runs more than once"):
        adopt(model, SHAPE)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nonsense", "is no factory"),
        ("no_such_package:f", "ModuleNotFoundError"),
        ("user_models:missing", "AttributeError"),
        ("user_models:broken", "ZeroDivisionError"),
        ("user_models:none", "builds a NoneType"),
    ],
)
def test_factories_that_fail(package, factory, message):
    with pytest.raises(MoepruneError, match=message):
        build(factory, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["x"], "no KEY=VALUE"),
        (["1x=2"], "no KEY=VALUE"),
        (["x=1", "x=2"], "given twice"),
        (["x={1}"], "JSON"),
    ],
)
def test_arguments_that_do_not_fit(given, message):
    with pytest.raises(MoepruneError, match=message):
        adopted.parse_arguments(given)


def test_what_other_libraries_cannot_express_is_refused():
    model = adopt(randomized(tower()), SHAPE)
    for scope, compensate in (("input", "none"), ("static", "none"), ("static", "mean")):
        pruned = prune(model, keep=2, scope=scope, compensate=compensate, data=dataset(), runtime=CPU)
        with pytest.raises(MoepruneError, match=f"scope {scope} and compensation {compensate}"):
            adopted.library_tensors(pruned, tower())


# --- commands ----------------------------------------------------------------------------------


@pytest.fixture
def trained(package, tmp_path):
    """A training checkpoint of a tower, and what its model computes."""
    theirs = randomized(tower(geglu=True))
    path = tmp_path / "trained.pt"
    weights = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "model": weights}, path)
    torch.save(encoder().state_dict(), "encoder.pt")
    with torch.no_grad():
        return path, theirs(images(dtype=torch.float32))


MODEL = ("--model", "user_models:tower")
BUILT = (*MODEL, "--model-arg", "geglu=True", "--input-shape", "3,8,8")


def test_commands_from_the_users_file_to_the_users_file(trained, run, run_json, tmp_path):
    path, expected = trained
    x = images(40, dtype=torch.float32)
    save_file({"inputs": x, "labels": torch.arange(40) % CLASSES}, "data.safetensors")
    found = run_json("convert", path, *BUILT, "-o", "full.safetensors")
    assert found["from"] == "soft-moe-pytorch"
    assert found["source"]["library"] == "soft-moe-pytorch"
    assert found["arguments"] == {"geglu": True}
    assert found["parity"]["max_relative_difference"] < 1e-9
    full = moeprune.load("full.safetensors", MODEL[1])
    assert relative_error(full(images(dtype=torch.float32)), expected) < 1e-5
    shown = run("inspect", "full.safetensors")
    assert shown.code == 0
    assert "user_models:tower(geglu=True)" in shown.stdout
    for words in (
        ("analyze", "full.safetensors", "--data", "data.safetensors", *MODEL, "-o", "analysis.safetensors"),
        ("prune", "full.safetensors", *MODEL, "--analysis", "analysis.safetensors", "--keep", 2,
         "--compensate", "lstsq", "-o", "lstsq.safetensors"),
        ("prune", "full.safetensors", "--analysis", "analysis.safetensors", "--keep", 2, "--one-shot",
         "--compensate", "renorm", "-o", "renorm.safetensors"),
        ("eval", "lstsq.safetensors", "--data", "data.safetensors", "--baseline", "full.safetensors", *MODEL),
        ("convert", "renorm.safetensors", "--to", "soft-moe-pytorch", *MODEL, "-o", "small.pt"),
    ):  # fmt: skip
        result = run(*words)
        assert (result.code, result.stderr) == (0, ""), words
    smaller = tower(geglu=True, num_experts=2)
    smaller.load_state_dict(torch.load("small.pt", weights_only=True), strict=True)
    pruned = moeprune.load("renorm.safetensors", MODEL[1])
    assert relative_error(smaller.eval()(x).detach(), pruned(x)) < 1e-5


def test_commands_on_a_model_with_dynamic_slots(package, run, run_json, tmp_path):
    torch.save(randomized(dynamic()).state_dict(), "trained.pt")
    x = images(40, dtype=torch.float32)
    save_file({"inputs": x, "labels": torch.arange(40) % CLASSES}, "data.safetensors")
    model = ("--model", f"{package}:dynamic")
    data = ("--data", "data.safetensors")
    found = run_json("convert", "trained.pt", *model, "--input-shape", "3,8,8", "-o", "full.safetensors")
    assert found["parity"]["max_relative_difference"] < 1e-9
    run_json("analyze", "full.safetensors", *data, *model, "-o", "analysis.safetensors")
    words = ("prune", "full.safetensors", "--keep", 2, *model, "--analysis", "analysis.safetensors")
    refused = run(*words, "-o", "static.safetensors")
    assert (refused.code, refused.stdout) == (2, "")
    assert "`module.layers.0` makes its slots anew" in refused.stderr
    assert not (tmp_path / "static.safetensors").exists()
    run_json(*words, "--scope", "input", "-o", "routed.safetensors")
    found = run_json("eval", "routed.safetensors", *data, *model, "--baseline", "full.safetensors")
    assert found["difference"]["flops_reduction"] > 0
    swept = run_json(
        "eval", "full.safetensors", *data, *model, "--sweep", "2", "--analysis", "analysis.safetensors",
        "--compensate", "none", "--compensate", "mean",
    )  # fmt: skip
    assert {row["scope"] for row in swept["rows"]} == {None, "input", "batch"}
    assert {row["signal"] for row in swept["rows"] if row["scope"] == "input"} > {"random"}
    found = run_json("convert", "full.safetensors", "--to", "soft-moe-pytorch", *model, "-o", "back.pt")
    back = torch.load("back.pt", weights_only=True)
    assert all(torch.equal(back[key], value) for key, value in torch.load("trained.pt").items())


def test_a_model_of_a_release_that_is_not_installed(package, run, run_json):
    torch.save(randomized(encoder()).state_dict(), "trained.pt")
    save_file({"inputs": images(8, dtype=torch.float32)}, "data.safetensors")
    model = ("--model", f"{package}:encoder")
    found = run_json(
        "convert", "trained.pt", *model, "--input-shape", "3,8,8",
        "--source", "soft-mixture-of-experts==0.1.0", "-o", "full.safetensors",
    )  # fmt: skip
    assert found["parity"] is None
    assert found["parity_skipped"] == "`soft-mixture-of-experts` 0.2.0 is installed, not 0.1.0"
    assert found["source"]["version"] == "0.1.0"
    result = run("analyze", "full.safetensors", "--data", "data.safetensors", *model, "-o", "a.safetensors")
    assert result.code == 0
    assert "takes its dispatch softmax over the batch, as it was trained" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("convert", "trained.pt", *BUILT[:4], "-o", "o.safetensors"), "--input-shape 3,224,224"),
        (("convert", "trained.pt", *BUILT[:5], "3,8", "-o", "o.safetensors"), "`--input-shape 3,8` is not"),
        (("convert", "trained.pt", *MODEL, *BUILT[-2:], "-o", "o.safetensors"), "`layers.0.experts"),
        (("convert", "trained.pt", *BUILT[:5], "1,8,8", "-o", "o.safetensors"), "fails on an input of shape"),
        (("convert", "trained.pt", "--input-shape", "3,8,8", "-o", "o.safetensors"), "go with `--model`"),
        (("convert", "trained.pt", "-o", "o.safetensors"), "`late.slot_embeds` is of a layer of"),
        (("convert", "encoder.pt", "-o", "o.safetensors"), "is of a layer of soft-mixture-of-exp"),
        (("convert", "trained.pt", *BUILT, "--source-arg", "a=1", "-o", "o.safetensors"), "does not go with"),
        (("convert", "trained.pt", *BUILT, "--source", "soft-moe", "-o", "o.st"), "not of `soft-moe`"),
        (("convert", "trained.pt", *BUILT, "--source", "vmoe", "-o", "o.st"), "`--source vmoe` is unknown"),
        (("convert", "trained.pt", *BUILT, "--source", "soft-moe==x", "-o", "o.st"), "names no release"),
        (("convert", "trained.pt", *BUILT, "--key", "ema", "-o", "o.safetensors"), "ema"),
        (("convert", "full.safetensors", *BUILT, "-o", "o.safetensors"), "file that your own code wrote"),
        (("convert", "full.safetensors", *MODEL, "--to", "soft-moe", "-o", "o.pt"), "not of `soft-moe`"),
        (("convert", "full.safetensors", "--to", "soft-moe-pytorch", "-o", "o.pt"), "user_models:tower"),
        (("eval", "full.safetensors", "--data", "digits"), "add `--model user_models:tower`"),
        (("analyze", "full.safetensors", "--data", "digits", *MODEL, "-o", "o.st"), "the model takes"),
    ],
)  # fmt: skip
def test_calls_that_are_wrong_leave_nothing_behind(words, message, trained, run, tmp_path):
    assert run("convert", trained[0], *BUILT, "-o", "full.safetensors").code == 0
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run(*words)
    assert result.code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_factory_does_not_go_with_a_model_of_ours(run, single):
    result = run("eval", single, "--data", "digits", "--model", "user_models:tower")
    assert result.code == 2
    assert "needs no `--model`" in result.stderr


def test_a_checkpoint_with_other_dynamic_slots_than_its_tokens_make_is_refused(tmp_path):
    soft_moe = SoftMoEConfig(8, 4, 5, 6, router_norm="none", dynamic_slots=True)
    config = ViTConfig((8, 8), (2, 2), 1, 3, dim=8, num_heads=2, blocks=(BlockConfig(soft_moe=soft_moe),))
    model = SoftMoEViT(config)
    moeprune.save(model, tmp_path / "model.safetensors")
    with pytest.raises(MoepruneError, match="has 5 dynamic slots per expert, expected 4: 16 tokens for 4"):
        moeprune.load(tmp_path / "model.safetensors")
