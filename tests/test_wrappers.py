"""Weights under the names that wrappers, trainers and averages give them: read as the model that is in them."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import moeprune
from moeprune.errors import MoepruneError
from tests.test_sources import GIVEN, fake_state

lucidrains = pytest.importorskip("soft_moe_pytorch")
SHAPE = (3, 8, 8)
D = 8
ONE = torch.ones(())


class Net(nn.Module):
    """A small model with a Soft MoE layer, and with what loads in ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, D, 4, 4)
        self.norm = nn.BatchNorm1d(D)
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.layer = lucidrains.SoftMoE(D, num_slots=1, num_experts=4, expert_mult=1)
        self.head = nn.Linear(D, 5)

    def forward(self, x):
        tokens = self.norm(self.embed(x).flatten(2)).mT
        return self.head(self.layer(self.first(tokens)).mean(1))


class Outer(nn.Module):
    """A model that is itself under an attribute, whatever that is called."""

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, x):
        return self.get_submodule(self.name)(x)


class Tied(Net):
    """Two layers share a weight, which a list holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(D, D)
        self.third = nn.Linear(D, D)
        self.third.weight = self.second.weight
        self.weights = [self.second.weight]

    def forward(self, x):
        tokens = self.norm(self.embed(x).flatten(2)).mT
        tokens = self.third(self.second(self.layer(self.first(tokens)))) @ self.weights[0]
        return self.head(tokens.mean(1))


class Versioned(Net):
    """Reads files of its first version, which had another name for the head."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        for part in ("weight", "bias") if local_metadata.get("version", 1) < 2 else ():
            state_dict[f"{prefix}head.{part}"] = -state_dict.pop(f"{prefix}classifier.{part}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(5)


class Told(Net):
    """Keeps what is no tensor in its state dict, and a buffer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("phase", torch.ones(D, dtype=torch.complex64))

    def get_extra_state(self):
        return {"factor": self.factor}

    def set_extra_state(self, state):
        self.factor = state["factor"]

    def forward(self, x):
        return super().forward(x) * self.factor * self.phase.real.mean()


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


class Kind(NamedTuple):
    """A state dict, and what must be given to load a file of it."""

    state: dict[str, torch.Tensor]
    given: dict[str, Any]


KINDS: dict[str, Callable[[], Kind]] = {
    "a library's": lambda: Kind(fake_state(), GIVEN),
    "one's own": lambda: Kind(drawn(Net()).state_dict(), {"model": Net, "input_shape": SHAPE}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)))


def write(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "found.pt")
    return folder / "found.pt"


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def in_the_middle(wrapper: str, state: dict) -> dict:
    """As of wrapped parts: a segment before the last part of every name that has several."""
    return {
        ".".join([*parts[:-1], wrapper, parts[-1]]) if len(parts := name.split(".")) > 2 else name: tensor
        for name, tensor in state.items()
    }


WRAPPED: dict[str, tuple[Callable[[dict], dict], str, set[str], list[str]]] = {
    "nothing": (dict, "", set(), []),
    "DistributedDataParallel": (partial(under, "module."), "", {"module"}, []),
    "an average of it": (
        lambda s: under("module.module.", s) | {"n_averaged": ONE}, "", {"module"}, ["n_averaged"]),
    "compiled and parallel": (partial(under, "_orig_mod.module."), "", {"module", "_orig_mod"}, []),
    "parallel and compiled": (partial(under, "module._orig_mod."), "", {"module", "_orig_mod"}, []),
    "compiled in parts": (partial(in_the_middle, "_orig_mod"), "", {"_orig_mod"}, []),
    "FSDP, activation checkpoints": (
        lambda s: under("_fsdp_wrapped_module.", in_the_middle("_checkpoint_wrapped_module", s)),
        "", {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}, [],
    ),
    "profiled": (
        lambda s: under("net.", s) | {"net.total_ops": ONE, "net.blocks.0.total_params": ONE.clone()},
        "net.", set(), ["net.blocks.0.total_params", "net.total_ops"],
    ),
    "Lightning": (partial(under, "net."), "net.", set(), []),
    "Lightning with a loss and a metric": (
        lambda s: under("model.", s) | {"criterion.weight": ONE.clone(), "acc.best": torch.tensor(torch.inf)},
        "model.", set(), ["acc.best", "criterion.weight"],
    ),
    "a backbone, compiled": (
        lambda s: under("model._orig_mod.backbone.", s), "model.backbone.", {"_orig_mod"}, []),
    "ema_pytorch": (
        lambda s: under("ema_model.", s) | {"initted": ONE.clone(), "step": ONE.clone()},
        "ema_model.", set(), ["initted", "step"],
    ),
    "one model under two names": (
        lambda s: under("a.", s) | under("b.", {n: t.clone() for n, t in s.items()}), "a.", set(), None),
    "an encoder of another kind beside it": (
        lambda s: under("model.", s) | under("teacher.blocks.0.", {"attn.weight": ONE.clone()}),
        "model.", set(), ["teacher.blocks.0.attn.weight"],
    ),
}  # fmt: skip


@every_kind
@pytest.mark.parametrize(("wrap", "prefix", "wrappers", "dropped"), WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights_are_the_model_in_them(kind, wrap, prefix, wrappers, dropped, tmp_path):
    state, given = KINDS[kind]()
    expected = logits(moeprune.load(write(tmp_path, state), **given))
    model = moeprune.load(write(tmp_path, {"state_dict": wrap(state)}), **given)
    assert torch.equal(logits(model), expected)
    reading = model.reading
    assert (reading.prefix, set(reading.wrappers)) == (prefix, wrappers)
    assert reading.dropped == (sorted(under("b.", state)) if dropped is None else dropped)


def test_of_several_models_one_is_chosen_by_prefix(tmp_path, run):
    for kind in KINDS:
        state, given = KINDS[kind]()
        other = {name: tensor * 2 for name, tensor in state.items()}
        both = under("module.online_model.", state) | under("module.ema_model.", other) | {"step": ONE}
        plain = [logits(moeprune.load(write(tmp_path, found), **given)) for found in (state, other)]
        path = write(tmp_path, both)
        with pytest.raises(MoepruneError, match=r"several whole models.*`ema_model\.`, `online") as caught:
            moeprune.load(path, **given)
        assert 'prefix="online_model."' in str(caught.value)
        for prefix, expected in (
            ("online_model.", plain[0]), ("module.online_model", plain[0]), ("ema_model", plain[1]),
        ):  # fmt: skip
            assert torch.equal(logits(moeprune.load(path, prefix=prefix, **given)), expected)
        with pytest.raises(MoepruneError, match=r"has the prefix `ema`\n\nhint: models start at `ema_model.`, `onl"):
            moeprune.load(path, prefix="ema", **given)
        nested = state | under("ema.", other)  # one model's names are the start of another's
        path = write(tmp_path, nested)
        with pytest.raises(MoepruneError, match=r"under the prefixes ``, `ema\.`"):
            moeprune.load(path, **given)
        for prefix, expected in (("", plain[0]), ("ema.", plain[1])):
            assert torch.equal(logits(moeprune.load(path, prefix=prefix, **given)), expected)
    moeprune.save(moeprune.load(path, prefix="", **given), tmp_path / "ours.safetensors")
    with pytest.raises(MoepruneError, match="takes no `prefix`"):
        moeprune.load(tmp_path / "ours.safetensors", prefix="", model=Net)


@every_kind
def test_a_part_of_a_model_is_no_model(kind, tmp_path):
    state, given = KINDS[kind]()
    part = {name: tensor for name, tensor in state.items() if not name.startswith("norm.w")}
    for found, expected in (
        (under("net.", part), ["missing `norm.weight`"]),
        (under("net.", part) | {"other.weight": ONE}, ["missing `norm.weight`"]),
        (under("net.", state | {"extra": ONE}), ["unexpected `extra`"]),
        (state | under("criterion.", {str(i): torch.ones(1) for i in range(40)}), ["unexpected", "37 more unexpected"]),
    ):
        with pytest.raises(MoepruneError) as caught:
            moeprune.load(write(tmp_path, found), **given)
        assert [text for text in expected if text not in str(caught.value)] == []


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict]]] = {
    "an attribute `model`": (lambda: Outer("model", Net()), nn.Module.state_dict),
    "an attribute `module`": (lambda: Outer("module", Net()), nn.Module.state_dict),
    "an attribute `module`, wrapped": (lambda: Outer("module", Net()), lambda m: under("module.", m.state_dict())),
    "DataParallel": (lambda: nn.DataParallel(Net()), nn.Module.state_dict),
    "DataParallel, saved without": (lambda: nn.DataParallel(Net()), lambda m: m.module.state_dict()),
    "compiled": (lambda: Outer("_orig_mod", Net()), nn.Module.state_dict),
    "compiled, saved without": (lambda: Outer("_orig_mod", Net()), lambda m: m._orig_mod.state_dict()),
    "compiled, saved from Lightning": (
        lambda: Outer("_orig_mod", Net()), lambda m: under("net.", m._orig_mod.state_dict())),
    "an average": (Net, lambda m: AveragedModel(m).state_dict()),
    "before BatchNorm counted": (
        Net, lambda m: {k: v for k, v in m.state_dict().items() if not k.endswith("num_batches_tracked")}),
    "weight norm of old": (
        Net, lambda m: {
            re.sub(r"parametrizations.weight.original(\d)", lambda found: f"weight_{'gv'[int(found[1])]}", k): v
            for k, v in m.state_dict().items()
        }),
    "old names of experts, wrapped": (
        Net, lambda m: under("net.module.", {
            k.replace("experts.experts.", "experts."): v for k, v in m.state_dict().items()
        })),
    "a version that is converted": (Versioned, nn.Module.state_dict),
    "a version that is converted, wrapped": (Versioned, lambda m: nn.DataParallel(m).state_dict()),
    "a version that is old": (Versioned, lambda m: {
        k.replace("head", "classifier"): -v if k.startswith("head") else v for k, v in m.state_dict().items()
    }),
    "layers that learn their width from the file": (Lazy, lambda m: under("net.", m.state_dict())),
    "tied": (Tied, nn.Module.state_dict),
    "tied and wrapped": (Tied, lambda m: under("net.module.", m.state_dict())),
    "tied, with one name": (Tied, lambda m: {k: v for k, v in m.state_dict().items() if k != "third.weight"}),
    "tied, with the other name": (Tied, lambda m: {k: v for k, v in m.state_dict().items() if k != "second.weight"}),
}  # fmt: skip


@pytest.mark.parametrize(("factory", "saved"), OWN.values(), ids=OWN)
def test_what_torch_loads_into_the_users_model(factory, saved, tmp_path):
    theirs = factory().eval()
    logits(theirs)  # for layers that learn their width from inputs
    path = write(tmp_path, {"model": saved(drawn(theirs))})
    model = moeprune.load(path, factory, input_shape=SHAPE)
    assert model.reading.parity.max_relative_difference < 1e-9
    torch.testing.assert_close(logits(model), logits(theirs))
    if isinstance(theirs, Tied):
        assert model.module.second.weight is model.module.third.weight is model.module.weights[0]


def test_files_of_save_model(tmp_path):
    theirs = drawn(Tied())
    save_model(theirs, str(tmp_path / "tied.safetensors"))
    model = moeprune.load(tmp_path / "tied.safetensors", Tied, input_shape=SHAPE)
    torch.testing.assert_close(logits(model), logits(theirs))
    assert model.module.second.weight is model.module.third.weight is model.module.weights[0]


def test_state_that_is_no_tensor_and_complex_buffers(tmp_path):
    theirs = drawn(Told())
    theirs.factor, theirs.phase[:] = 3.0, 2 + 1j
    for found in (theirs.state_dict(), under("net.", nn.DataParallel(theirs).state_dict())):
        model = moeprune.load(write(tmp_path, found), Told, input_shape=SHAPE)
        torch.testing.assert_close(logits(model), logits(theirs))
    moeprune.save(model, tmp_path / "ours.safetensors")
    again = moeprune.load(tmp_path / "ours.safetensors", Told)
    assert torch.equal(logits(again), logits(model))
    assert again.module.get_extra_state() == {"factor": 3.0}
    moeprune.export(again, tmp_path / "theirs.pt", "soft-moe-pytorch")
    Told().load_state_dict(torch.load(tmp_path / "theirs.pt"), strict=True)
    with pytest.raises(MoepruneError, match="no safetensors file can hold `_extra_state`"):
        moeprune.export(again, tmp_path / "theirs.safetensors", "soft-moe-pytorch")
    again.module.factor = (1, 2)
    with pytest.raises(MoepruneError, match=r"_extra_state. is a dict that no checkpoint can hold \(it would change"):
        moeprune.save(again, tmp_path / "other.safetensors")
    found["net.module._extra_state"] = {"factor": Path("run")}
    with pytest.raises(MoepruneError, match="is of type dict"):
        moeprune.load(write(tmp_path, found), Told, input_shape=SHAPE)


def test_integers_become_the_modules_and_floats_keep_their_type(tmp_path):
    state = drawn(Net()).half().state_dict()
    state["norm.num_batches_tracked"] = torch.tensor(7, dtype=torch.int32)
    model = moeprune.load(write(tmp_path, state), Net, input_shape=SHAPE)
    assert {t.dtype for n, t in model.state_dict().items() if t.is_floating_point()} == {torch.float16}
    assert model.module.norm.num_batches_tracked.dtype == torch.int64
    for name, tensor in (("head.bias", torch.ones(5).int()), ("norm.num_batches_tracked", torch.ones(()))):
        with pytest.raises(MoepruneError, match=f"`{name}` has the type {tensor.dtype}"):
            moeprune.load(write(tmp_path, state | {name: tensor}), Net, input_shape=SHAPE)


def test_what_is_left_out_is_said(tmp_path, run, caplog):
    state, given = KINDS["a library's"]()
    arguments = [f"--source-arg={key}={value}" for key, value in given.items()]
    others = {f"criterion.{index}": ONE for index in range(9)}
    path = write(tmp_path, under("module.net.", state) | others)
    result = run("inspect", path, *arguments)
    assert result.code == 0
    assert "net., module." in result.stdout
    assert "criterion.2, and 6 more" in result.stdout
    assert "9 tensors are left out: `criterion.0`, `criterion.1`, `criterion.2` and 6 more" in result.stderr
    assert "left out" not in run("inspect", path, *arguments, "--prefix", "net").stderr
    assert others.keys() == set(moeprune.load(path, **given).reading.dropped)


def test_hooks_of_the_user_that_fail(tmp_path):
    class Failing(Net):
        def get_extra_state(self):
            print("on stdout")
            raise KeyError("mine")

    state = drawn(Net()).state_dict()
    with pytest.raises(MoepruneError, match="`state_dict` fails: KeyError: 'mine'"):
        moeprune.load(write(tmp_path, state), Failing, input_shape=SHAPE)
    lazy = {name: tensor for name, tensor in state.items() if name != "embed.bias"}
    with pytest.raises(MoepruneError, match=r"builds: missing `embed\.bias`\n"):
        moeprune.load(write(tmp_path, lazy), Lazy, input_shape=SHAPE)
