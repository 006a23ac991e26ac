"""Token-gated layers of the user's own code: a router and a list of experts."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeprune
from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.gated_moe import GatedMoE
from moeprune.layers.layer import new_layer
from moeprune.models.adopted import adopt
from tests.test_soft_moe import relative_error

SHAPE, D, N, H = (1, 8, 8), 12, 6, 10


class Gated(nn.Module):
    """Three linears, of which one gates another."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, D))


@dataclass(frozen=True)
class Kind:
    """How a layer is written."""

    gates: str = "softmax"
    top_k: int = 2
    normalized: bool = True
    bias: bool = False  # of the router
    selection: bool = False
    transposed: bool = False
    gated: bool = False
    experts: int = N


class MoE(nn.Module):
    """A loop over experts, as most are written."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.experts = nn.ModuleList((Gated if kind.gated else mlp)() for _ in range(kind.experts))
        if kind.transposed:
            self.w_gate = nn.Parameter(torch.zeros(D, kind.experts))
            self.register_buffer("mean", torch.zeros(1))
        else:
            self.gate = nn.Linear(D, kind.experts, bias=kind.bias)
        if kind.selection:
            self.register_buffer("correction", torch.zeros(kind.experts))

    def scores(self, x: Tensor) -> Tensor:
        logits = x @ self.w_gate if self.kind.transposed else self.gate(x)
        return logits.softmax(-1) if self.kind.gates == "softmax" else logits.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.scores(tokens)
        chosen = (scores + self.correction if self.kind.selection else scores).topk(self.kind.top_k).indices
        weights = scores.gather(1, chosen)
        if self.kind.normalized:
            weights = weights / weights.sum(1, keepdim=True)
        output = torch.zeros_like(tokens)
        for j, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == j)
            if len(rows):
                output.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return output.view_as(x)


class Net(nn.Module):
    """Patches, two such layers, and a head."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.layers, self.head = nn.Conv2d(1, D, 2, 2), nn.ModuleList(layers), nn.Linear(D, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean(1))


def build(experts: int = N) -> Net:
    """What `--model` names."""
    kind = Kind("sigmoid", bias=True, experts=experts)
    return randomized(Net([MoE(kind), MoE(replace(kind, top_k=1, normalized=False))]))


def randomized(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*net.parameters(), *net.buffers()):
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.5 if tensor.ndim > 1 else 0.2))
    return net.eval()


def images(count: int = 30) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


KINDS = [
    *(Kind(gates, k, normalized) for gates, k, normalized in
      itertools.product(("softmax", "sigmoid"), (1, 2, N), (False, True))),
    Kind(bias=True), Kind("sigmoid", 3, selection=True), Kind("sigmoid", 3, bias=True, selection=True),
    Kind(transposed=True), Kind(transposed=True, bias=False, gated=True), Kind(gated=True, normalized=False),
    Kind(experts=D), Kind(experts=D, transposed=True),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_our_layer_computes_the_same(kind):
    net, x = randomized(Net([MoE(kind), MoE(kind)])).double(), images().double()
    expected = net(x)
    model = adopt(net, SHAPE)
    assert relative_error(model(x), expected) < 1e-12
    for layer in model.moe_layers.values():
        assert isinstance(layer, GatedMoE)
        config = layer.config
        assert (config.top_k, config.num_experts, config.hidden_dim) == (kind.top_k, kind.experts, H)
        if kind.top_k > 1:
            assert config.gates == kind.gates
        assert config.router_bias == kind.bias
        assert config.selection_bias == kind.selection


@pytest.mark.parametrize("kind", [Kind(), Kind(transposed=True), Kind("sigmoid", selection=True)])
def test_how_a_layer_gates_is_known_whatever_its_weights_are(kind):
    """A router of zeros gives all experts the same gate."""
    net = randomized(Net([MoE(kind)]))
    for name, tensor in net.state_dict().items():
        if name.startswith(("layers.0.gate", "layers.0.w_gate", "layers.0.correction")):
            tensor.zero_()
    (layer,) = adopt(net, SHAPE).moe_layers.values()
    config = layer.config
    assert (config.gates, config.top_k, config.normalized) == (kind.gates, 2, True)
    assert config.selection_bias == kind.selection


def test_a_layer_of_half_precision_is_known():
    net = randomized(Net([MoE(Kind(top_k=3, normalized=False))])).bfloat16()
    expected = net(images().bfloat16())
    model = adopt(net, SHAPE)
    config = next(iter(model.moe_layers.values())).config
    assert (config.gates, config.top_k, config.normalized) == ("softmax", 3, False)
    assert relative_error(model(images().bfloat16()).float(), expected.float()) < 0.03


class Limited(MoE):
    """An expert takes its first two tokens only."""

    def forward(self, x: Tensor) -> Tensor:
        full = super().forward(x)
        return torch.cat([full[:, :2], x[:, 2:]], 1)


class Pair(MoE):
    """Gives a loss, too."""

    def forward(self, x: Tensor):
        return super().forward(x), x.mean()


class Mixed(MoE):
    """With two kinds of experts."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.experts[1] = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Limited, r"layer `layers\.1`, a Limited, has experts and perhaps a router, and computes none of: softmax"),
        (Pair, r"layer `layers\.1` gives a tuple, expected a tensor"),
        (Mixed, r"expert `layers\.1\.experts\.1` has other tensors than `layers\.1\.experts\.0`"),
    ],
)
def test_what_ours_cannot_compute_is_refused_unless_it_is_ignored(layer, message):
    with pytest.raises(MoepruneError, match=message) as raised:
        adopt(randomized(Net([MoE(Kind()), layer(Kind())])), SHAPE)
    assert raised.value.hint == "`--ignore-layer layers.1` leaves it as it is"
    if layer is not Pair:
        model = adopt(randomized(Net([MoE(Kind()), layer(Kind())])), SHAPE, ignore_layers=["layers.1"])
        assert [*model.moe_layers] == ["module.layers.0"]


@pytest.fixture
def files(tmp_path):
    """The weights, and data that the model labels itself."""
    net = build()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = images(400)
    labels = net(x).argmax(1).numpy()
    for name, part in (("calibration", slice(0, 300)), ("test", slice(300, 400))):
        np.savez(tmp_path / f"{name}.npz", inputs=x[part].numpy(), labels=labels[part])
    return tmp_path


def test_it_is_pruned_evaluated_and_given_back(files, run, run_json):
    """By the commands; the file that comes back loads in the user's class, built with fewer experts."""
    own = ("--model", "tests.test_own_gated:build")
    given = (*own, "--input-shape", "1,8,8", "--preprocess", "mean=0")
    options = ("--data", files / "calibration.npz", "--keep", "1/2", "--compensate", "renorm-refit")
    report = run_json("prune", files / "net.pt", *given, *options, "-o", files / "pruned.safetensors")
    assert all(layer["k"] == N // 2 for layer in report["plan"].values())
    result = run_json(
        "eval", files / "pruned.safetensors", *own, "--data", files / "test.npz",
        "--baseline", files / "net.pt", "--input-shape", "1,8,8", "--preprocess", "mean=0",
    )  # fmt: skip
    assert result["model"]["parameters"] < result["baseline_model"]["parameters"]
    found = run_json("export", files / "pruned.safetensors", *own, "--to", "own", "-o", files / "back.pt")
    assert {name: layer["arguments"] for name, layer in found["layers"].items()} == {
        f"layers.{index}": {"num_experts": N // 2} for index in range(2)
    }
    assert "not known how a MoE is built with fewer experts" in found["parity"]["skipped"]
    smaller = build(experts=N // 2)
    smaller.load_state_dict(torch.load(files / "back.pt", weights_only=True))
    expected = moeprune.load(files / "pruned.safetensors", model="tests.test_own_gated:build")
    assert relative_error(smaller(images()), expected(images())) < 1e-5


class Noisy(MoE):
    """Has weights that training alone uses."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.w_noise = nn.Parameter(torch.randn(D, kind.experts))


class Tied(MoE):
    """Has one expert twice, and its router under two names."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.experts[1], self.router = self.experts[0], self.gate


class Twice(MoE):
    """Has its router under two names."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.router = self.gate


class Weighted(MoE):
    """Has weight-normalised experts."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        for expert in self.experts:
            nn.utils.parametrizations.weight_norm(expert[3])


def build_of(layer: str) -> Net:
    return Net([{each.__name__: each for each in (Noisy, Tied, Twice, Weighted)}[layer](Kind())])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("Noisy", "`w_noise` of a Noisy takes no part in its output, and has not been kept"),
        ("Tied", "a Tied has one expert in several places"),
        ("Weighted", "a Sequential has no `3.weight` that could take what was fitted"),
        ("Twice", None),
    ],
)
def test_what_cannot_be_given_back_is_refused(layer, message, tmp_path):
    net = randomized(build_of(layer))
    expected = net(images())
    model = moeprune.adopt(net, SHAPE, build_of, {"layer": layer})
    assert relative_error(model(images()), expected) < 1e-5
    pruned = moeprune.prune(model, keep=3, data=images(), compensate="renorm-refit")
    if message is None:
        return moeprune.export(pruned, tmp_path / "back.pt", "own")
    with pytest.raises(MoepruneError, match=message):
        moeprune.export(pruned, tmp_path / "back.pt", "own")
    assert not (tmp_path / "back.pt").exists()


class Flat(MoE):
    """Takes single tokens only."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2
        return super().forward(x)


class Pooled(nn.Module):
    """The layer behind the mean token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.moe, self.head = nn.Conv2d(1, D, 2, 2), Flat(Kind()), nn.Linear(D, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.moe(self.embed(x).flatten(2).mean(2)))


def test_a_layer_of_single_tokens_is_known():
    net, x = randomized(Pooled()).double(), images().double()
    expected = net(x)
    assert relative_error(adopt(net, SHAPE)(x), expected) < 1e-12


class Maps(Net):
    """Calls layers with maps of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).movedim(1, -1)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return self.head(tokens.mean((1, 2)))


def test_maps_of_tokens_are_refused():
    message = r"layer `layers\.0` gives \[1, 4, 4, 12\] for an input, expected its tokens \(1, m, 12\)"
    with pytest.raises(MoepruneError, match=message):
        adopt(randomized(Maps([MoE(Kind())])), SHAPE)


class Wide(MoE):
    """Has logits in float32, whatever its type."""

    def scores(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.gate.weight.float()).softmax(1).to(x.dtype)


@pytest.mark.parametrize("layer", [MoE, Wide])
def test_the_type_of_the_logits_is_known_in_half_precision(layer):
    kind = Kind(experts=16)
    (ours,) = adopt(randomized(Net([layer(kind)])).bfloat16(), SHAPE).moe_layers.values()
    assert ours.config.float32_router == (layer is Wide)


def test_flops_are_those_of_the_rest_and_of_the_layers():
    model = adopt(build(), SHAPE)
    embed, head, tokens = 2 * 16 * D * 4, 2 * D * 10, 16
    assert model.config.other_flops == embed + head
    assert model.cost().flops_per_input.routing == 2 * 2 * tokens * D * N
    assert model.cost().flops_per_input.experts == 2 * 2 * D * H * tokens * (2 + 1)


class Heads(nn.Module):
    """A Soft MoE behind which heads are mixed."""

    def __init__(self) -> None:
        super().__init__()
        config = SoftMoEConfig(D, 4, slots_per_expert=1, hidden_dim=H)
        self.embed, self.moe = nn.Conv2d(1, D, 2, 2), nn.Sequential(new_layer(config))
        self.gate, self.experts = nn.Linear(D, 3), nn.ModuleList(nn.Linear(D, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.moe(self.embed(x).flatten(2).mT).mean(1)
        return (self.gate(tokens).softmax(1)[:, :, None] * torch.stack([e(tokens) for e in self.experts], 1)).sum(1)


def test_a_module_around_another_layer_is_none_itself():
    assert [*adopt(randomized(Heads()), SHAPE).moe_layers] == ["module.moe.0"]


def test_an_error_leaves_a_module_as_it_is():
    net = randomized(Net([MoE(Kind()), Limited(Kind())]))
    with pytest.raises(MoepruneError):
        adopt(net, SHAPE)
    assert isinstance(net.layers[0], MoE)
    assert adopt(net, SHAPE, ignore_layers=["layers.1"]).config.libraries == ("own",)


@pytest.mark.parametrize("experts", ["mlp", "norm"])
def test_layers_are_exported_for_any_number_of_inputs(experts):
    net = build() if experts == "mlp" else trained(experts)
    model = adopt(net, SHAPE)
    batch = torch.export.Dim("b", min=1, max=64)
    graph = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},)).module()
    assert relative_error(graph(images(7)), model(images(7))) < 1e-5


# --- experts of any kind
class Residual(nn.Module):
    """Ends with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Again(nn.Module):
    """Runs one linear twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(D, D), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.inner(x).tanh()).tanh())


EXPERTS = {
    "norm": lambda: nn.Sequential(nn.LayerNorm(D), *mlp()),
    "three": lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, D)),
    "again": Again,
    "norm at the end": lambda: nn.Sequential(*mlp(), nn.LayerNorm(D)),
    "residual": Residual,
}
NO_LAST = ("norm at the end", "residual")


class Adapted(nn.Module):
    """Ends with a sum that a fresh module does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.down, self.up = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.zeros(2, D))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.scale * self.last(hidden) + hidden @ self.down @ self.up


class Clamped(nn.Linear):
    """One linear, and more."""

    def __init__(self) -> None:
        super().__init__(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


EXPERTS |= {"adapted": Adapted, "clamped": Clamped}
NO_LAST += ("adapted", "clamped")


class Modules(MoE):
    def __init__(self, expert: str, count: int = N) -> None:
        super().__init__(Kind("sigmoid", experts=count))
        self.experts = nn.ModuleList(EXPERTS[expert]() for _ in range(count))


def build_modules(expert: str, count: int = N) -> Net:
    """As modules are initialised."""
    return Net([Modules(expert, count), Modules(expert, count)]).eval()


def trained(expert: str) -> Net:
    return randomized(build_modules(expert))


@pytest.mark.parametrize("expert", EXPERTS)
def test_experts_of_any_kind_run_as_they_are(expert):
    net, x = trained(expert).double(), images().double()
    expected = net(x)
    model = adopt(net, SHAPE)
    assert relative_error(model(x), expected) < 1e-12
    assert relative_error(model(x[:1]), expected[:1]) < 1e-12
    flops = next(iter(model.moe_layers.values())).config.flops(16).experts
    rows, of_expert = 16 * 2, sum(tensor.numel() for tensor in EXPERTS[expert]().parameters() if tensor.ndim == 2)
    of_expert += D * D * (expert in NO_LAST or expert == "again")
    assert flops == 2 * rows * of_expert


@pytest.mark.parametrize(
    "expert", [each if each in ("norm", "adapted") else pytest.param(each, marks=pytest.mark.slow) for each in EXPERTS]
)
def test_experts_of_any_kind_are_pruned_refitted_and_saved(expert, tmp_path):
    arguments = {"expert": expert}
    model = moeprune.adopt(trained(expert), SHAPE, build_modules, arguments)
    errors, data = {}, images(300)
    ways = {"renorm": {}, "renorm-refit": {}, "mean": {}, "lstsq": {}, "affine": {}, "low-rank": {"rank": 4}}
    for name, more in ways.items():
        pruned = moeprune.prune(model, data=data, keep=3, compensate=name, signal="gram", **more)
        errors[name] = relative_error(pruned(data), model(data))
        path = tmp_path / f"{name}.safetensors"
        moeprune.save(pruned, path)
        assert torch.equal(moeprune.load(path, model=build_modules)(data), pruned(data))
        assert pruned.cost().bytes < model.cost().bytes
    assert errors["renorm-refit"] < 0.7 * errors["renorm"]
    assert errors["low-rank"] < errors["mean"]
    with pytest.raises(MoepruneError, match="experts without hidden units that could be dropped"):
        moeprune.prune(model, data=data, width=2)
    expected, back = moeprune.load(tmp_path / "renorm-refit.safetensors", model=build_modules), tmp_path / "back.pt"
    if expert in NO_LAST:
        with pytest.raises(MoepruneError, match="has no last linear that could take what was fitted"):
            moeprune.export(expected, back, "own")
        return
    moeprune.export(expected, back, "own")
    smaller = build_modules(expert, count=3)
    smaller.load_state_dict(torch.load(back, weights_only=True))
    assert relative_error(smaller(data), expected(data)) < 1e-5


class Activated(nn.Module):
    """Tensors do not tell what it computes."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(D, H), nn.Linear(H, D), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def unlike() -> list[nn.Module]:
    return [Activated(torch.sin), Activated(torch.cos)]


def buffered() -> list[nn.Module]:
    experts = [EXPERTS["norm"](), EXPERTS["norm"]()]
    for expert in experts:
        expert[0].register_buffer("scale", torch.ones(1), persistent=False)
    return experts


def shared() -> list[nn.Module]:
    experts = [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(2)]
    for expert in experts:
        expert[3].weight = expert[1].weight
    return experts


def counted() -> list[nn.Module]:
    experts = [EXPERTS["norm"](), EXPERTS["norm"]()]
    for expert in experts:
        expert[0].register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    return experts


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (unlike, r"expert `layers\.0\.experts\.1` does not compute what `layers\.0\.experts\.0` does"),
        (buffered, r"`layers\.0\.experts\.0` has the tensor `0\.scale`, which is not in its state dict"),
        (shared, r"`layers\.0\.experts\.0` has one tensor in several places"),
        (counted, r"`layers\.0\.experts\.0` has tensors of the types torch\.float32, torch\.int64"),
    ],
)
def test_modules_that_cannot_be_stacked_are_refused(experts, message):
    layer = MoE(Kind(experts=2))
    layer.experts = nn.ModuleList(experts())
    with pytest.raises(MoepruneError, match=message) as raised:
        adopt(randomized(Net([layer])), SHAPE)
    assert raised.value.hint == "`--ignore-layer layers.0` leaves it as it is"


def test_a_layer_of_modules_is_adopted_again():
    model = adopt(trained("norm"), SHAPE)
    expected = model(images())
    assert torch.equal(adopt(model.module, SHAPE)(images()), expected)
