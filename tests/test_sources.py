"""Checkpoints of soft-moe: each option of the library's own class, in and out again."""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moeprune
from moeprune.data.datasets import from_tensors
from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models import libraries, parity
from moeprune.models.architecture import BlockConfig, ViTConfig, architecture_from_json
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.vit import SoftMoEViT
from tests import peers
from tests.damage import metadata_of

needs_library = pytest.mark.skipif(not peers.has("soft_moe"), reason="soft-moe is not installed")
BASE = {
    "num_experts": 4, "slots_per_expert": 2, "moe_layer_index": 1, "img_size": 8, "patch_size": 4,
    "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 4,
}  # fmt: skip
OPTIONS = {
    "as it is": {},
    "pooled by mean": {"global_pool": "avg"},
    "pooled by mean, norm before": {"global_pool": "avg", "fc_norm": False},
    "not pooled": {"global_pool": ""},
    "norm after the pooling": {"fc_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, not pooled": {"class_token": False, "global_pool": ""},
    "class token without position": {"no_embed_class": True},
    "norm before the blocks": {"pre_norm": True},
    "queries and keys normalised": {"qk_norm": True},
    "layer scale": {"init_values": 0.1},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "every block": {"moe_layer_index": 0, "depth": 3},
    "some blocks": {"moe_layer_index": [0, 2], "depth": 3},
    "one slot": {"num_experts": 7, "slots_per_expert": 1},
    "as many slots as can be": {"num_experts": 3, "slots_per_expert": 5},
    "an odd width": {"embed_dim": 30, "num_heads": 3, "mlp_ratio": 2.55},
    "a wide image": {"img_size": (8, 20), "in_chans": 1},
    "a tall image of flat patches": {"img_size": (12, 8), "patch_size": (2, 4), "in_chans": 4},
    "a square image of flat patches": {"patch_size": (2, 4)},
    "no head": {"num_classes": 0},
    "nothing normalised": {"normalize": False},
    "another eps": {"eps": 1e-3},
    "tanh gelu": {"act_layer": "GELUTanh"},
    "relu": {"act_layer": "ReLU"},
    "all at once": {
        "global_pool": "avg", "no_embed_class": True, "pre_norm": True, "qk_norm": True, "init_values": 1.0,
        "qkv_bias": False, "moe_layer_index": [1], "depth": 3, "img_size": (4, 12), "in_chans": 2,
    },
}  # fmt: skip


def library_model(**options) -> nn.Module:
    """The library's own model with random weights, none of which is at a neutral value."""
    from soft_moe import SoftMoEVisionTransformer
    from timm import layers

    options = BASE | options
    eps, normalize = options.pop("eps", None), options.pop("normalize", True)
    act_layer = options.pop("act_layer", "GELU")
    options["act_layer"] = getattr(layers if act_layer == "GELUTanh" else nn, act_layer)
    if eps is not None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=eps)
    model = SoftMoEVisionTransformer(**options)
    for block in model.blocks:
        if hasattr(block.mlp, "phi") and not normalize:
            block.mlp.normalize = False
            del block.mlp.scale
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_factor = parameter.ndim == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.3 * drawn if is_factor else 0.3 * drawn)
    return model.requires_grad_(False).eval()


def given(model_options: dict) -> dict:
    """What has to be said of a model, besides its file."""
    options = BASE | {"global_pool": "token"} | model_options
    said = {"global_pool", "eps", "no_embed_class", "act_layer"} | (set() if options.get("qk_norm") else {"num_heads"})
    if isinstance(options["img_size"], tuple):  # not square
        said.add("img_size")
    return {name: value for name, value in options.items() if name in said}


def images(model: SoftMoEViT, b: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, *model.input_format.shape, generator=generator, dtype=torch.float64)


def largest_difference(ours: SoftMoEViT, theirs: nn.Module, dtype: torch.dtype) -> float:
    """Of logits, over the largest of theirs; neither model is changed."""
    x = images(ours).to(dtype)
    logits, expected = (copy.deepcopy(model).to(dtype)(x) for model in (ours, theirs))
    assert logits.shape == expected.shape
    return float((logits - expected).abs().max() / expected.abs().max())


def check_equal(found: dict, expected: dict) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def write(tmp_path):
    """Save a state dict as users do, under a name of this kind."""

    def write(tensors: dict, name: str = "theirs.pt") -> Path:
        (save_file if name.endswith(".safetensors") else torch.save)(tensors, tmp_path / name)
        return tmp_path / name

    return write


# --- every option, in and out
COMBINED = set(OPTIONS["all at once"])
"""Options that are tested by themselves where time does not matter."""


@pytest.mark.mostly_slow(4)
@needs_library
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=pytest.mark.slow if options and set(options) < COMBINED else (), id=name)
        for name, options in OPTIONS.items()
    ],
)
def test_every_option_comes_in_and_goes_back(options, write, tmp_path):
    theirs = library_model(**options)
    state = theirs.state_dict()
    ours = moeprune.load(write(state), **given(options))
    reading = ours.reading
    assert (reading.library, reading.dropped) == ("soft-moe", [])
    assert reading.parity.max_relative_difference < 1e-12
    assert reading.parity.dtype == "float64"
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in (BASE | options).items()}
    for key in ("init_values", "mlp_ratio"):  # the tensors show that there is one, or how wide it is
        stated.pop(key, None)
    assert {key: reading.arguments[key] for key in stated} == stated
    assert set(ours.details.source) == {"library", "version", "sha256"}

    assert largest_difference(ours, theirs, torch.float64) < 1e-9
    assert largest_difference(ours, theirs, torch.float32) < 1e-5
    assert architecture_from_json(json.loads(json.dumps(ours.config.to_json()))) == ours.config
    as_safetensors = moeprune.load(write(state, "theirs.safetensors"), **given(options))
    check_equal(as_safetensors.state_dict(), ours.state_dict())
    moeprune.save(ours, tmp_path / "ours.safetensors")
    saved = moeprune.load(tmp_path / "ours.safetensors")
    assert (saved.config, saved.details, saved.reading) == (ours.config, ours.details, None)

    for back in (tmp_path / "back.pt", tmp_path / "back.safetensors"):
        found = moeprune.export(saved, back, "soft-moe")
        assert found.parity.max_relative_difference < 1e-12
        check_equal(torch.load(back) if back.suffix == ".pt" else load_file(back), state)

    for choice in ({"compensate": "renorm"}, {"compensate": "renorm-refit", "data": images(ours, 12).float()}):
        pruned = moeprune.prune(ours, keep=2, signal="random", **choice)
        found = moeprune.export(pruned, tmp_path / "sliced.pth", "soft-moe", overwrite=True)
        assert found.arguments["num_experts"] == 2
        smaller = library_model(**options | {"num_experts": 2})
        smaller.load_state_dict(torch.load(tmp_path / "sliced.pth"), strict=True)
        assert largest_difference(pruned, smaller, torch.float64) < 1e-9
        assert largest_difference(pruned, theirs, torch.float64) > 1e-6


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype, write, tmp_path):
    state = library_model().to(dtype).state_dict()
    ours = moeprune.load(write(state), **given({}))
    assert ours.reading.parity.max_relative_difference < 1e-12
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {dtype}
    moeprune.export(ours, tmp_path / "back.bin", "soft-moe")
    check_equal(torch.load(tmp_path / "back.bin"), state)


def stacked(state: dict) -> dict:
    """The layout of the paper's authors: experts of a layer in one tensor, and one more that never runs."""
    tensors, experts = {}, {}
    for name, tensor in state.items():
        layer, is_expert, rest = name.partition(".experts.")
        if is_expert:
            experts.setdefault((layer, rest.partition(".")[2]), []).append(tensor)
        else:
            tensors[name] = tensor
    for (layer, part), of_layer in experts.items():
        tensors[f"{layer}.stacked_expert_{part.replace('.', '_')}"] = torch.stack(of_layer)
        tensors[f"{layer}.base_expert.{part}"] = torch.full_like(of_layer[0], torch.nan)
    return tensors


@needs_library
def test_stacked_experts(write, tmp_path):
    theirs = library_model()
    ours = moeprune.load(write(stacked(theirs.state_dict())), **given({}))
    assert ours.reading.dropped == [
        f"blocks.1.mlp.base_expert.fc{i}.{part}" for i in (1, 2) for part in ("bias", "weight")
    ]
    assert ours.reading.parity.max_relative_difference < 1e-12
    assert largest_difference(ours, theirs, torch.float64) < 1e-9
    moeprune.export(ours, tmp_path / "back.pt", "soft-moe")
    check_equal(torch.load(tmp_path / "back.pt"), theirs.state_dict())


@needs_library
@pytest.mark.parametrize(
    ("layers", "size", "width", "expected"),
    [
        ((1, 2), (4, 2), 40, "hidden units of MLPs and experts is not the"),
        ((2,), (3, 1), 96, "everywhere: 3 or 4; the number of slots"),
    ],
)
def test_what_the_librarys_model_cannot_be_built_with(layers, size, width, expected, write, tmp_path):
    from soft_moe import SoftMoELayerWrapper
    from timm.layers import Mlp

    theirs = library_model(depth=3)
    for index in layers:
        theirs.blocks[index].mlp = SoftMoELayerWrapper(24, *size, Mlp, in_features=24, hidden_features=width)
    state = randomize(theirs).state_dict()
    ours = moeprune.load(write(stacked(state) if width == 40 else state), **given({}))
    assert ours.reading.parity.max_relative_difference is None
    assert expected in ours.reading.parity.skipped
    if width == 40:
        assert int(24 * ours.reading.arguments["moe_mlp_ratio"]) == width
    else:
        assert ours.reading.arguments["num_experts"] == [3, 4]
    assert largest_difference(ours, theirs, torch.float64) < 1e-9
    with pytest.raises(MoepruneError, match=expected):
        moeprune.export(ours, tmp_path / "back.pt", "soft-moe")


@needs_library
def test_equal_input_gives_equal_bytes(write, tmp_path):
    path = write(library_model().state_dict())
    names = ("ours.safetensors", "back.pt", "back.bin", "back.safetensors")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        ours = moeprune.load(path, **given({}))
        moeprune.save(ours, tmp_path / folder / names[0])
        for name in names[1:]:
            moeprune.export(ours, tmp_path / folder / name, "soft-moe")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_defaults_and_preprocessing(write, tmp_path):
    path, settings = write(fake_state()), {"resize": 9, "mean": 0.5}
    ours = moeprune.load(path, **GIVEN, preprocess=settings)
    guessed = {"act_layer": "GELU", "eps": 1e-6, "img_size": 8, "no_embed_class": False}
    assert ours.reading.defaults == guessed
    assert (ours.details.preprocessing.resize, ours.details.preprocessing.mean) == (9, (0.5,))
    told = moeprune.load(path, **GIVEN, eps=1e-6, img_size="8x8", no_embed_class=False)
    assert told.reading.defaults == {"act_layer": "GELU"}
    assert told.config == ours.config


@needs_library
def test_a_model_of_ours_goes_out(tmp_path):
    """Trained with torch's eps, which the library has to be told."""
    config = OURS.replace(class_token=False, pooling="mean", norm_eps=1e-5, blocks=OURS.blocks[:2])
    model = randomize(SoftMoEViT(config))
    assert moeprune.export(model, tmp_path / "x.pt", "soft-moe").arguments["eps"] == 1e-5
    options = {"mlp_ratio": 2, "eps": 1e-5, "class_token": False, "global_pool": "avg", "fc_norm": False}
    theirs = library_model(**options)
    theirs.load_state_dict(torch.load(tmp_path / "x.pt"), strict=True)
    assert largest_difference(model, theirs, torch.float64) < 1e-9


@needs_library
@pytest.mark.parametrize("option", ["not pooled", "no head"])
def test_without_logits_of_images_all_but_evaluate_works(option, write):
    options = {"num_classes": 10, "in_chans": 1} | OPTIONS[option]
    ours = moeprune.load(write(library_model(**options).state_dict()), **given(options))
    data = moeprune.open_data("digits", ours.input_format, "test", 20)
    pruned = moeprune.prune(ours, moeprune.analyze(ours, data), keep=2, compensate="mean")
    with pytest.raises(MoepruneError, match="each of its 5 tokens" if option == "not pooled" else "no head"):
        moeprune.evaluate(pruned, data)


# --- parity
def refused(path: Path, **arguments) -> str:
    """The error of a file that cannot be loaded."""
    with pytest.raises(MoepruneError) as caught:
        moeprune.load(path, **arguments)
    return str(caught.value)


@needs_library
def test_without_the_library_a_file_is_loaded_all_the_same(write, monkeypatch):
    path = write(library_model().state_dict())
    monkeypatch.setitem(sys.modules, "soft_moe", None)
    assert "cannot be imported" in moeprune.load(path, **given({})).reading.parity.skipped


@needs_library
def test_a_difference_is_an_error(write, tmp_path, monkeypatch):
    path = write(library_model().state_dict())
    ours = moeprune.load(path, **given({}))
    build = SoftMoEViTs.build

    def wrong(self, config):
        model = build(self, config)
        model.global_pool = "avg"
        return model

    monkeypatch.setattr(SoftMoEViTs, "build", wrong)
    assert "differ by" in refused(path, **given({}))
    with pytest.raises(MoepruneError, match="differ by"):
        moeprune.export(ours, tmp_path / "x.pt", "soft-moe")
    assert not (tmp_path / "x.pt").exists()


@needs_library
def test_parity_takes_what_memory_allows(write, monkeypatch):
    state = library_model().state_dict()
    path, numel = write(state), sum(tensor.numel() for tensor in state.values())
    for factor, dtype in ((13, "float64"), (11, "float32"), (7, None)):
        monkeypatch.setattr(parity, "_available_memory", lambda factor=factor: factor * numel)
        found = moeprune.load(path, **given({})).reading.parity
        assert found.dtype == dtype
        assert (found.skipped is None) == (dtype is not None)


@needs_library
def test_zero_logits_prove_nothing(write):
    state = library_model().state_dict()
    state["head.weight"].zero_()
    state["head.bias"].zero_()
    found = moeprune.load(write(state), **given({})).reading.parity
    assert found.max_relative_difference is None
    assert "zero" in found.skipped


# --- what is refused
MOE = SoftMoEConfig(24, num_experts=4, slots_per_expert=2, hidden_dim=48)
OURS = ViTConfig(
    (8, 8), (4, 4), 3, 5, dim=24, num_heads=4, class_token=True, pooling="token", norm_eps=1e-6,
    blocks=(BlockConfig(mlp_dim=48), BlockConfig(soft_moe=MOE), BlockConfig(soft_moe=MOE)),
)  # fmt: skip


def fake_state(depth: int = 2) -> dict:
    """The tensors of the library's model, made without the library."""
    generator = torch.Generator().manual_seed(0)
    entries = SoftMoEViTs().entries(OURS.replace(blocks=OURS.blocks[:depth]))
    shapes = {name: entry.shape for entry in entries for name in entry.theirs} | {"pos_embed": (1, 5, 24)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


GIVEN = {"num_heads": 4, "global_pool": "token"}


@needs_library
def test_the_fake_state_is_the_librarys():
    state = library_model(mlp_ratio=2).state_dict()
    assert {name: t.shape for name, t in fake_state().items()} == {name: t.shape for name, t in state.items()}


EVERY_SIZE = "`img_size` (8x12, 12x8, 4x24, 24x4, 4x28 with no_embed_class=true or 28x4 with no_embed_class=true)"
ASKED = [
    (5, {}, ["`num_heads` (1, 2, 3, 4, 6, 8, 12 or 24)", "`global_pool` (token, avg or '')"]),
    (5, {"num_heads": 4}, ["`global_pool` (token, avg or '')"]),
    (7, GIVEN, [EVERY_SIZE]),
    (7, {}, ["`num_heads` (", "`global_pool` (", EVERY_SIZE]),
    (7, GIVEN | {"no_embed_class": True}, ["`img_size` (4x28 with no_embed_class=true or 28x4 with no_"]),
    (5, GIVEN | {"no_embed_class": True}, ["`img_size` (4x20 with no_embed_class=true or 20x4 with no_"]),
    (9, GIVEN, ["`img_size` (12x12 with no_embed_class=true, 8x16, 16x8, 4x32, 32x4, 4x36 with no_"]),
    (225, GIVEN, ["`img_size` (60x60 with no_embed_class=true, 56x64, 64x56, ", " or one of 15 others)"]),
]
"""Rows of the position embedding, what is given, and what is asked for."""


@pytest.mark.parametrize(("rows", "said", "expected"), ASKED)
def test_what_is_missing_is_asked_for_at_once(rows, said, expected, write):
    error = refused(write(changed(pos_embed=torch.ones(1, rows, 24))), **said)
    names = {fragment.split("`")[1] for fragment in expected if "`" in fragment}
    asked = [f"{name}=..." for name in names]
    assert [fragment for fragment in (*expected, *asked) if fragment not in error] == []
    assert {name for name in ("num_heads", "global_pool", "img_size") if name in error} == names


@pytest.mark.parametrize(
    ("rows", "said", "size", "guessed", "warning"),
    [
        (9, {"no_embed_class": True}, (12, 12), {"img_size": 12}, ""),
        (9, {"img_size": "8x16"}, (8, 16), {}, ""),
        (9, {"img_size": 12}, (12, 12), {}, ""),
        (145, {}, (48, 48), {"img_size": 48, "no_embed_class": False}, "also fit 36x64 or 64x36"),
        (145, {"img_size": 48}, (48, 48), {}, ""),
    ],
)  # fmt: skip
def test_what_is_guessed_of_the_positions_is_reported(rows, said, size, guessed, warning, write, caplog):
    model = moeprune.load(write(changed(pos_embed=torch.ones(1, rows, 24))), **GIVEN | said)
    assert model.config.image_size == size
    assert model.config.num_positions == rows
    assert model.reading.defaults == guessed | {"act_layer": "GELU", "eps": 1e-6}
    assert warning in caplog.text if warning else not caplog.records


def test_queries_normalised_by_head_tell_their_number(write):
    state = fake_state()
    for index in range(2):
        for norm in ("q_norm", "k_norm"):
            state |= {f"blocks.{index}.attn.{norm}.{part}": torch.ones(8) for part in ("weight", "bias")}
    path = write(state)
    error = refused(path)
    assert "global_pool" in error
    assert "num_heads" not in error
    assert "`num_heads` is 4, expected 3" in refused(path, **GIVEN)
    state["blocks.0.attn.q_norm.weight"] = torch.ones(7)
    assert "`blocks.0.attn.q_norm.bias` is [8], expected [24]; 5 more of another shape" in refused(
        write(state), **GIVEN
    )


UNFIT = [
    ({"heads": 4}, ["`heads`"]),
    ({"num_heads": "four"}, ["`num_heads`", "int", "'four'"]),
    ({"num_heads": 5}, ["`num_heads` is 5, expected 1, 2, 3, 4, 6, 8, 12 or 24"]),
    ({"global_pool": "max"}, ["`global_pool`", "max"]),
    ({"eps": 2.0}, ["`eps`", "1"]),
    ({"eps": float("nan")}, ["eps"]),
    ({"no_embed_class": 1}, ["`no_embed_class`", "bool"]),
    ({"img_size": "1x2x3"}, ["`img_size`"]),
    ({"img_size": [1, 2, 3]}, ["`img_size`"]),
    ({"img_size": 9}, ["`img_size` is (9, 9), expected 8x8, 4x16, 16x4, 4x20 with no_embed_class=true or 20x4 with"]),
    ({"img_size": 8, "no_embed_class": True}, ["`img_size` is (8, 8), expected 4x20 with no_embed_class=true or 20x4"]),
    ({"act_layer": "PReLU"}, ["`act_layer` is 'PReLU', expected GELU, GELUTanh, QuickGELU, ReLU,"]),
    ({"act_layer": 1}, ["`act_layer`", "str"]),
    ({"num_heads": 5, "img_size": 9}, ["`num_heads` is 5", "`img_size` is (9, 9)"]),
]


def test_a_pooled_class_token_must_be_there(write):
    state = changed(cls_token=None, pos_embed=torch.ones(1, 4, 24))
    assert "`global_pool` is 'token', expected avg or ''" in refused(write(state), **GIVEN)
    assert "`global_pool` (avg or '')" in refused(write(state))


def changed(**tensors) -> dict:
    """The library's tensors with some of them changed; None: without it."""
    state = fake_state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


DAMAGED = [
    (
        {"norm__weight": None, "head__bias": None, "blocks__1__mlp__experts__2__fc1__bias": None,
         "a": torch.ones(1), "blocks__0__extra": torch.ones(1)},
        "missing `blocks.1.mlp.experts.2.fc1.bias`; missing `head.bias`; missing `norm.weight`;"
        " unexpected `a`; unexpected `blocks.0.extra`",
    ),
    ({"patch_embed__proj__weight": None}, "missing `patch_embed.proj.weight`"),
    ({"pos_embed": None}, "missing `pos_embed`"),
    ({"head__weight": None}, "those of a whole model: missing `head.weight`"),
    ({"blocks__0__mlp__fc1__weight": None}, "those of a whole model: missing `blocks.0.mlp.fc1.weight`"),
    (
        {f"blocks__1__mlp__experts__0__fc{i}__{part}": None for i in (1, 2) for part in ("weight", "bias")},
        "missing `blocks.1.mlp.experts.0.fc1.bias`; missing `blocks.1.mlp.experts.0.fc1.weight`; missing"
        " `blocks.1.mlp.experts.0.fc2.bias`; 1 more missing",
    ),
    ({"blocks__0__norm1__weight": torch.ones(12)}, "`blocks.0.norm1.weight` is [12], expected [24]"),
    ({"blocks__1__mlp__experts__3__fc1__weight": torch.ones(40, 24)}, "is [40, 24], expected [48, 24]"),
    ({"head__bias": torch.ones(6)}, "`head.bias` is [6], expected [5]"),
    ({"blocks__0__mlp__fc2__bias": torch.ones(24).int()}, "`blocks.0.mlp.fc2.bias` has the type torch.int32"),
    (
        {"norm__bias": torch.full((24,), torch.nan), "cls_token": torch.full((1, 1, 24), torch.inf)},
        "has NaN or infinite values in `cls_token`, `norm.bias`",
    ),
    ({"head__bias": torch.ones(0)}, "have no elements: `head.bias` [0]"),
    ({"blocks__999999999__norm1__weight": torch.ones(24)}, "has a block 999999999, but only"),
]  # fmt: skip


ALL = [*(({}, *row) for row in UNFIT), *((tensors, {}, [message]) for tensors, message in DAMAGED)]


@pytest.mark.parametrize(("tensors", "said", "expected"), ALL, ids=[str(row[2])[:60] for row in ALL])
def test_damaged_files_and_arguments_that_do_not_fit(tensors, said, expected, write):
    error = refused(write(changed(**tensors)), **GIVEN | said) + "\n"
    lines = [f"{part}\n" if "missing" in part else part for part in expected]  # nothing else is listed
    assert [part for part in lines if part not in error] == []


def test_weights_of_several_types_are_not_saved(write, tmp_path):
    model = moeprune.load(write(changed(cls_token=torch.ones(1, 1, 24).half())), **GIVEN)
    with pytest.raises(MoepruneError, match="several types: `class_token`"):
        moeprune.save(model, tmp_path / "x.safetensors")


def test_a_layer_without_its_router(write):
    state = fake_state(depth=3)
    del state["blocks.1.mlp.phi"]
    assert "those of a whole model: missing `blocks.1.mlp.phi`" in refused(write(state), **GIVEN)
    del state["blocks.2.mlp.phi"]
    assert "not a model of a known library" in refused(write(state), **GIVEN)
    assert "missing `blocks.1.mlp.phi`; missing `blocks.2.mlp.phi`" in refused(write(state), **GIVEN, source="soft-moe")


LOOKALIKES = [
    (["layers.0.block_sparse_moe.gate.weight", "layers.0.block_sparse_moe.experts.0.w1.weight"], "top-k"),
    (["layer.1.mlp.router.classifier.weight", "layer.1.mlp.experts.expert_0.wi.weight"], "top-k"),
    (["blocks.0.mlp.w_gate", "blocks.0.mlp.experts.0.fc1.weight", "blocks.0.attn.qkv.weight"], "top-k"),
    (["moe.gate.wg.weight", "moe.experts.deepspeed_experts.0.weight"], "top-k"),
    (["attn_layers.layers.0.0.0.gamma", "attn_layers.layers.0.1.to_q.weight"], "x-transformers"),
    (["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "`timm` without experts"),
    (["blocks.0.soft_moe.phi", "blocks.0.soft_moe.fc1_weight"], "lost its metadata"),
    (["encoder.phi", "encoder.experts.0.fc1.weight"], "belongs to a Soft MoE layer, in an unknown model"),
    (["conv1.weight"], "none of its 1 tensors matches a known layout"),
    (["gate_proj.weight"], "none of its 1 tensors matches a known layout"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), LOOKALIKES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_lookalikes_are_told_by_name(names, expected, suffix, write):
    error = refused(write({name: torch.ones(2) for name in names}, f"x{suffix}"))
    assert expected in error
    assert "soft-moe" in error.split("hint: ")[1]


def test_a_source_may_be_named(write, monkeypatch):
    path = write(fake_state())
    assert "`source` is 'nonsense', expected one of soft-moe" in refused(path, source="nonsense")
    assert "only its layers\n\nhint: name the function that builds the model" in refused(
        path, source="soft-moe-pytorch"
    )
    twin = SoftMoEViTs()
    twin.name = "twin"
    monkeypatch.setitem(libraries.MODELS, "twin", twin)
    assert "`soft-moe` and `twin`" in refused(path, **GIVEN)
    assert moeprune.load(path, **GIVEN, source="soft-moe").reading.library == "soft-moe"
    vit = write({"blocks.0.attn.qkv.weight": torch.ones(2)}, "vit.pt")
    assert "no Soft MoE layer" in refused(vit, source="soft-moe")


@pytest.mark.parametrize("said", [{"source": "soft-moe"}, GIVEN, {"key": "ema"}, {"input_shape": (3, 8, 8)}])
def test_a_checkpoint_of_ours_needs_nothing_said(said, single):
    assert all(f"`{name}`" in refused(single, **said) for name in said if name not in GIVEN)
    assert "is a checkpoint of moeprune and takes no" in refused(single, **said)


# --- what the library cannot express
@pytest.mark.parametrize(
    ("scope", "compensate", "expected"),
    [
        ("static", "none", "compensation none, under which the router still weighs the dropped experts"),
        ("static", "mean", "compensation mean"),
        ("static", "lstsq", "compensation lstsq"),
        ("static", "low-rank", "compensation low-rank"),
        ("input", "renorm", "chooses its experts anew for each input"),
        ("batch", "none", "chooses its experts anew for each batch"),
    ],
)
def test_pruned_models_that_are_no_smaller_library_model(scope, compensate, expected, write, tmp_path):
    model = moeprune.load(write(fake_state()), **GIVEN)
    data = from_tensors("drawn", images(model, 8).float(), None, 5)
    pruned = moeprune.prune(model, keep=2, data=data, scope=scope, compensate=compensate)
    with pytest.raises(MoepruneError, match=f"layer `blocks.1.soft_moe` .*{expected}"):
        moeprune.export(pruned, tmp_path / "x.pt", "soft-moe")
    assert not (tmp_path / "x.pt").exists()


def test_all_experts_kept_is_unpruned(write, tmp_path):
    model = moeprune.load(write(fake_state()), **GIVEN)
    pruned = moeprune.prune(model, keep=4, signal="random", compensate="none")
    moeprune.export(pruned, tmp_path / "x.pt", "soft-moe")
    check_equal(torch.load(tmp_path / "x.pt"), fake_state())


INEXPRESSIBLE = [
    ([BlockConfig(attention=False, soft_moe=MOE)], {}, "block 0 has no attention"),
    ([BlockConfig(residual=False, soft_moe=MOE)], {}, "block 0 has no residual"),
    ([BlockConfig(mlp_dim=40), BlockConfig(soft_moe=MOE)], {}, "is not the same everywhere: 40 or 48"),
    ([BlockConfig(soft_moe=SoftMoEConfig(24, 4, 2, 48, "rms"))], {}, "`router_norm` rms, expected l2"),
    ([BlockConfig(soft_moe=SoftMoEConfig(24, 4, 2, 48, "l2", "raw"))], {}, "has `dispatch_input` raw"),
    ([BlockConfig(soft_moe=MOE.replace(activation="relu2"))], {}, "has `activation` relu2, expected gelu"),
    ([BlockConfig(soft_moe=MOE.replace(expert="geglu"))], {}, "has `expert` geglu, expected mlp"),
    ([BlockConfig(soft_moe=MOE.replace(bias=False))], {}, "has `bias` False, expected True"),
    (
        [BlockConfig(mlp_dim=48), BlockConfig(soft_moe=MOE)],
        {"activation": "relu"},
        "the activation of MLPs and experts is not the same everywhere: gelu or relu",
    ),
    ([BlockConfig(soft_moe=MOE)], {"final_norm": False}, "neither of `final_norm` and `head_norm`"),
    ([BlockConfig(soft_moe=MOE)], {"head_norm": True}, "both of `final_norm` and `head_norm`"),
    (
        [BlockConfig(soft_moe=MOE), BlockConfig(soft_moe=SoftMoEConfig(24, 5, 3, 48))],
        {},
        "not the same everywhere: 4 or 5; the number of slots per expert is not the same everywhere: 2 or 3",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "options", "expected"), INEXPRESSIBLE)
def test_architectures_that_the_library_lacks(blocks, options, expected, tmp_path):
    config = OURS.replace(blocks=tuple(blocks), **options)
    with pytest.raises(MoepruneError, match=re.escape(expected)):
        moeprune.export(randomize(SoftMoEViT(config)), tmp_path / "x.pt", "soft-moe")


@pytest.mark.parametrize("to", ["nonsense", "soft-moe-pytorch"])
def test_targets_that_do_not_fit(to, single, tmp_path):
    with pytest.raises(MoepruneError, match=f"`{to}`"):
        moeprune.export(moeprune.load(single), tmp_path / "x.pt", to)


def test_the_shipped_models_say_what_they_said(single, vit):
    """Fields of an architecture that came later leave no trace in what is written of older models."""
    for path in (single, vit):
        written = metadata_of(path.read_bytes())["architecture"]
        assert json.loads(json.dumps(architecture_from_json(written).to_json())) == written
        assert moeprune.load(path).moe_layers
