"""Checkpoints of other libraries: each option of the library's own class, in and out again."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.models import conversion, parity
from moeprune.models import libraries as sources
from moeprune.models.architecture import BlockConfig, ViTConfig, vit_from_json
from moeprune.models.libraries.bwconrad import SoftMoEPackage
from moeprune.models.vit import SoftMoEViT
from tests import peers

needs_library = pytest.mark.skipif(not peers.has("soft_moe"), reason="soft-moe is not installed")
BASE = {
    "num_experts": 4,
    "slots_per_expert": 2,
    "moe_layer_index": 1,
    "img_size": 8,
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 4,
}
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
    "all at once": {
        "global_pool": "avg", "no_embed_class": True, "pre_norm": True, "qk_norm": True, "init_values": 1.0,
        "qkv_bias": False, "moe_layer_index": [1], "depth": 3, "img_size": (4, 12), "in_chans": 2,
    },
}  # fmt: skip


def library_model(**options) -> nn.Module:
    """The library's own model with random weights, none of which is at a neutral value."""
    from soft_moe import SoftMoEVisionTransformer

    options = BASE | options
    eps, normalize = options.pop("eps", None), options.pop("normalize", True)
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


def source_args(model_options: dict) -> list[str]:
    """What has to be said of a model, beside its file."""
    options = BASE | {"global_pool": "token"} | model_options
    height, width = (
        options["img_size"] if isinstance(options["img_size"], tuple) else [options["img_size"]] * 2
    )
    given = {"global_pool": options["global_pool"]}
    if not options.get("qk_norm"):
        given["num_heads"] = options["num_heads"]
    if height != width:
        given["img_size"] = f"{height}x{width}"
    if "eps" in options:
        given["eps"] = options["eps"]
    return [word for key, value in given.items() for word in ("--source-arg", f"{key}={value}")]


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
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        else:
            torch.save(tensors, path)
        return path

    return write


# --- every option, in and out --------------------------------------------------------------------


COMBINED = set(OPTIONS["all at once"])
"""Options that are tested by themselves where time does not matter."""


@needs_library
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if options and set(options) < COMBINED else name
        for name, options in OPTIONS.items()
    ],
)
def test_every_option_comes_in_and_goes_back(name, write, tmp_path, run_json, run):
    options = OPTIONS[name]
    theirs = library_model(**options)
    state = theirs.state_dict()
    path, ours_path = write(state), tmp_path / "ours.safetensors"
    found = run_json("convert", path, "-o", ours_path, *source_args(options))
    assert (found["from"], found["to"], found["dropped"]) == ("soft-moe", "moeprune", [])
    assert found["parity"]["max_relative_difference"] < 1e-12
    assert found["parity"]["dtype"] == "float64"
    given = {
        key: list(value) if isinstance(value, tuple) else value for key, value in (BASE | options).items()
    }
    for key in ("init_values", "mlp_ratio"):  # the tensors say whether, or how wide
        given.pop(key, None)
    assert {key: found["arguments"][key] for key in given} == given

    ours = moeprune.load(ours_path)
    assert largest_difference(ours, theirs, torch.float64) < 1e-9
    assert largest_difference(ours, theirs, torch.float32) < 1e-5
    assert vit_from_json(json.loads(json.dumps(ours.config.to_json()))) == ours.config
    assert set(found["source"]) == {"library", "version", "sha256"}
    assert ours.details.source == found["source"]

    as_safetensors = tmp_path / "again.safetensors"
    run_json("convert", write(state, "theirs.safetensors"), "-o", as_safetensors, *source_args(options))
    check_equal(load_file(as_safetensors), load_file(ours_path))

    for back in (tmp_path / "back.pt", tmp_path / "back.safetensors"):
        found = run_json("convert", ours_path, "-o", back, "--to", "soft-moe")
        assert found["parity"]["max_relative_difference"] < 1e-12
        check_equal(torch.load(back) if back.suffix == ".pt" else load_file(back), state)

    pruned_path, sliced = tmp_path / "pruned.safetensors", tmp_path / "sliced.pth"
    pruning = ("--keep", 2, "--signal", "random", "--compensate", "renorm", "-o", pruned_path)
    assert run("prune", ours_path, *pruning).code == 0
    found = run_json("convert", pruned_path, "-o", sliced, "--to", "soft-moe")
    assert found["arguments"]["num_experts"] == 2
    smaller = library_model(**options | {"num_experts": 2})
    smaller.load_state_dict(torch.load(sliced), strict=True)
    assert largest_difference(moeprune.load(pruned_path), smaller, torch.float64) < 1e-9
    assert largest_difference(moeprune.load(pruned_path), theirs, torch.float64) > 1e-6


@needs_library
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype, write, tmp_path, run_json):
    state = library_model().to(dtype).state_dict()
    found = run_json("convert", write(state), "-o", tmp_path / "ours.safetensors", *source_args({}))
    assert found["parity"]["max_relative_difference"] < 1e-12
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours.safetensors").values()} == {dtype}
    run_json("convert", tmp_path / "ours.safetensors", "-o", tmp_path / "back.bin", "--to", "soft-moe")
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
def test_stacked_experts(write, tmp_path, run_json):
    theirs = library_model()
    path, ours = write(stacked(theirs.state_dict())), tmp_path / "ours.safetensors"
    found = run_json("convert", path, "-o", ours, *source_args({}))
    assert found["dropped"] == [
        f"blocks.1.mlp.base_expert.fc{i}.{part}" for i in (1, 2) for part in ("bias", "weight")
    ]
    assert found["parity"]["max_relative_difference"] < 1e-12
    assert largest_difference(moeprune.load(ours), theirs, torch.float64) < 1e-9
    run_json("convert", ours, "-o", tmp_path / "back.pt", "--to", "soft-moe")
    check_equal(torch.load(tmp_path / "back.pt"), theirs.state_dict())
    run_json("convert", path, "-o", tmp_path / "direct.pt", "--to", "soft-moe", *source_args({}))
    check_equal(torch.load(tmp_path / "direct.pt"), theirs.state_dict())


@needs_library
def test_stacked_experts_of_their_own_width(write, tmp_path, run_json, run):
    from soft_moe import SoftMoELayerWrapper
    from timm.layers import Mlp

    theirs = library_model()
    theirs.blocks[1].mlp = SoftMoELayerWrapper(24, 4, 2, Mlp, in_features=24, hidden_features=40)
    randomize(theirs)
    path, ours = write(stacked(theirs.state_dict())), tmp_path / "ours.safetensors"
    args = (*source_args({}), "--source-arg", "mlp_ratio=4", "--source-arg", "moe_mlp_ratio=1.68")
    found = run_json("convert", path, "-o", ours, *args)
    assert found["parity"] is None
    assert "40 or 96" in found["parity_skipped"]
    assert int(24 * found["arguments"]["moe_mlp_ratio"]) == 40
    assert largest_difference(moeprune.load(ours), theirs, torch.float64) < 1e-9
    result = run("convert", ours, "-o", tmp_path / "back.pt", "--to", "soft-moe")
    assert result.code == 2
    assert "hidden units of MLPs and experts is not the same everywhere: 40 or 96" in result.stderr


@needs_library
def test_layers_of_different_size(write, tmp_path, run_json, run):
    from soft_moe import SoftMoELayerWrapper
    from timm.layers import Mlp

    theirs = library_model(depth=3)
    theirs.blocks[2].mlp = SoftMoELayerWrapper(24, 3, 1, Mlp, in_features=24, hidden_features=96)
    randomize(theirs)
    ours = tmp_path / "ours.safetensors"
    found = run_json("convert", write(theirs.state_dict()), "-o", ours, *source_args({}))
    assert found["parity"] is None
    assert found["arguments"]["num_experts"] == [3, 4]
    assert largest_difference(moeprune.load(ours), theirs, torch.float64) < 1e-9
    result = run("convert", ours, "-o", tmp_path / "back.pt", "--to", "soft-moe")
    assert result.code == 2
    assert "experts is not the same everywhere: 3 or 4; the number of slots" in result.stderr


@needs_library
def test_text_says_what_was_taken_and_how_far_the_models_are_apart(write, tmp_path, run):
    path = write(library_model().state_dict())
    result = run("convert", path, "-o", tmp_path / "ours.safetensors", *source_args({}))
    assert (result.code, result.stderr) == (0, "")
    lines = " ".join(result.stdout.split())
    assert "taken from the library's defaults act_layer='GELU', eps=1e-06, img_size=8" in lines
    assert "parity logits of 4 random images differ by at most" in lines
    given = (*source_args({}), "--source-arg", "eps=1e-6", "--source-arg", "img_size=8", "--force")
    result = run("convert", path, "-o", tmp_path / "ours.safetensors", *given)
    assert "taken from the library's defaults  act_layer='GELU'\n" in result.stdout


@needs_library
def test_equal_input_gives_equal_bytes(write, tmp_path, run_json):
    path = write(library_model().state_dict())
    for name in ("a", "b"):
        run_json("convert", path, "-o", tmp_path / f"{name}.safetensors", *source_args({}))
        for suffix in (".pt", ".bin", "-back.safetensors"):
            back = tmp_path / f"{name}{suffix}"
            run_json("convert", tmp_path / f"{name}.safetensors", "-o", back, "--to", "soft-moe")
    for suffix in (".safetensors", ".pt", ".bin", "-back.safetensors"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@needs_library
def test_preprocessing_is_written(write, tmp_path, run_json):
    args = ("--preprocess", "resize=9", "--preprocess", "mean=0.5")
    path = write(library_model().state_dict())
    run_json("convert", path, "-o", tmp_path / "ours.safetensors", *source_args({}), *args)
    shown = run_json("inspect", tmp_path / "ours.safetensors")["preprocessing"]
    assert (shown["resize"], shown["mean"]) == (9, [0.5])


@needs_library
def test_a_model_of_ours_goes_out(tmp_path, run_json):
    """Trained with torch's eps, which the library has to be told."""
    moe = SoftMoEConfig(24, num_experts=4, slots_per_expert=2, hidden_dim=48)
    blocks = (BlockConfig(mlp_dim=48), BlockConfig(soft_moe=moe))
    model = randomize(SoftMoEViT(ViTConfig((8, 8), (4, 4), 3, 5, dim=24, num_heads=4, blocks=blocks)))
    moeprune.save(model, tmp_path / "ours.safetensors")
    found = run_json("convert", tmp_path / "ours.safetensors", "-o", tmp_path / "x.pt", "--to", "soft-moe")
    assert found["from"] == "moeprune"
    assert found["arguments"]["eps"] == 1e-5
    options = {"mlp_ratio": 2, "eps": 1e-5, "class_token": False, "global_pool": "avg", "fc_norm": False}
    theirs = library_model(**options)
    theirs.load_state_dict(torch.load(tmp_path / "x.pt"), strict=True)
    assert largest_difference(model, theirs, torch.float64) < 1e-9


@needs_library
@pytest.mark.parametrize("option", ["not pooled", "no head"])
def test_without_logits_of_images_all_but_eval_works(option, write, tmp_path, run_json, run):
    ours = tmp_path / "ours.safetensors"
    options = {"num_classes": 10, "in_chans": 1} | OPTIONS[option]
    run_json("convert", write(library_model(**options).state_dict()), "-o", ours, *source_args(options))
    run_json("analyze", ours, "--data", "digits", "--limit", 20, "-o", tmp_path / "analysis.safetensors")
    pruning = ("--analysis", tmp_path / "analysis.safetensors", "--keep", 2, "--compensate", "mean")
    run_json("prune", ours, *pruning, "-o", tmp_path / "pruned.safetensors")
    result = run("eval", tmp_path / "pruned.safetensors", "--data", "digits", "--limit", 20)
    assert result.code == 2
    assert ("each of its 5 tokens" if option == "not pooled" else "no head") in result.stderr


# --- parity --------------------------------------------------------------------------------------


def refused(run, *arguments) -> str:
    """What a command says that exits with 2, prints nothing else and writes nothing."""
    arguments = [str(argument) for argument in arguments]
    output = Path(arguments[arguments.index("-o") + 1]) if "-o" in arguments else None
    result = run(*arguments)
    assert (result.code, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert output is None or not output.exists()
    return result.stderr


def going_back(path: Path) -> list[object]:
    """The command that writes a checkpoint of ours for the library."""
    return ["convert", path, "-o", path.with_name("theirs-again.pt"), "--to", "soft-moe"]


@needs_library
def test_without_the_library_the_file_is_converted_all_the_same(write, tmp_path, run_json, monkeypatch):
    path = write(library_model().state_dict())
    monkeypatch.setitem(sys.modules, "soft_moe", None)
    found = run_json("convert", path, "-o", tmp_path / "ours.safetensors", *source_args({}))
    assert found["parity"] is None
    assert "cannot be imported" in found["parity_skipped"]


@needs_library
def test_a_difference_is_an_error(write, tmp_path, run, monkeypatch):
    path = write(library_model().state_dict())
    build = SoftMoEPackage.build

    def wrong(self, config):
        model = build(self, config)
        model.global_pool = "avg"
        return model

    run("convert", path, "-o", tmp_path / "ours.safetensors", *source_args({}))
    monkeypatch.setattr(SoftMoEPackage, "build", wrong)
    stderr = refused(run, "convert", path, "-o", tmp_path / "x.safetensors", *source_args({}))
    assert "nothing is written" in stderr
    assert "nothing is written" in refused(run, *going_back(tmp_path / "ours.safetensors"))


@needs_library
def test_parity_takes_what_memory_allows(write, tmp_path, run_json, monkeypatch):
    state = library_model().state_dict()
    path, numel = write(state), sum(tensor.numel() for tensor in state.values())
    for factor, dtype in ((13, "float64"), (11, "float32"), (7, None)):
        monkeypatch.setattr(parity, "_available_memory", lambda factor=factor: factor * numel)
        args = ("-o", tmp_path / "ours.safetensors", "--force", *source_args({}))
        found = run_json("convert", path, *args)
        assert (found["parity"] or {"dtype": None})["dtype"] == dtype
        assert (found["parity_skipped"] is None) == (dtype is not None)


@needs_library
def test_zero_logits_prove_nothing(write, tmp_path, run_json):
    state = library_model().state_dict()
    state["head.weight"].zero_()
    state["head.bias"].zero_()
    found = run_json("convert", write(state), "-o", tmp_path / "ours.safetensors", *source_args({}))
    assert found["parity"] is None
    assert "zero" in found["parity_skipped"]


# --- what is refused -----------------------------------------------------------------------------


def fake_state(**options) -> dict:
    """The tensors of the library's model, made without the library."""
    base = {"depth": 2, "rows": 5, "dim": 24, "n": 4, "p": 2, "h": 48} | options
    dim, n, h = base["dim"], base["n"], base["h"]
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, base["rows"], dim),
        "patch_embed.proj.weight": (dim, 3, 4, 4), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (5, dim), "head.bias": (5,),
    }  # fmt: skip
    for index in range(base["depth"]):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm{i}.{part}": (dim,) for i in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{block}.attn.qkv.weight": (3 * dim, dim), f"{block}.attn.qkv.bias": (3 * dim,)}
        shapes |= {f"{block}.attn.proj.weight": (dim, dim), f"{block}.attn.proj.bias": (dim,)}
        mlps = [f"{block}.mlp.experts.{j}" for j in range(n)] if index else [f"{block}.mlp"]
        for mlp in mlps:
            shapes |= {f"{mlp}.fc1.weight": (h, dim), f"{mlp}.fc1.bias": (h,)}
            shapes |= {f"{mlp}.fc2.weight": (dim, h), f"{mlp}.fc2.bias": (dim,)}
        if index:
            shapes |= {f"{block}.mlp.phi": (dim, n, base["p"]), f"{block}.mlp.scale": (1,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


GIVEN = ("--source-arg", "num_heads=4", "--source-arg", "global_pool=token")


@needs_library
def test_the_fake_state_is_the_librarys():
    state = library_model(mlp_ratio=2).state_dict()
    assert {name: t.shape for name, t in fake_state().items()} == {name: t.shape for name, t in state.items()}


ASKED = [
    ({}, (), ["`num_heads` (1, 2, 3, 4, 6, 8, 12 or 24)", "`global_pool` (token, avg or '')"]),
    ({}, ("num_heads=4",), ["`global_pool` (token, avg or '')"]),
    ({"rows": 7}, GIVEN[1::2], ["`img_size` (4x24, 8x12, 12x8, 24x4, 4x28 or 28x4)"]),
    ({"rows": 7}, (), ["num_heads", "global_pool", "img_size"]),
    ({"rows": 7}, (*GIVEN[1::2], "no_embed_class=true"), ["`img_size` (4x28 or 28x4)"]),
    ({"rows": 5}, (*GIVEN[1::2], "no_embed_class=true"), ["`img_size` (4x20 or 20x4)"]),
]


@pytest.mark.parametrize(("options", "given", "expected"), ASKED)
def test_what_is_missing_is_asked_for_at_once(options, given, expected, write, tmp_path, run):
    args = [word for setting in given for word in ("--source-arg", setting)]
    path = write(fake_state(**options))
    stderr = refused(run, "convert", path, "-o", tmp_path / "x.safetensors", *args)
    for fragment in (
        *expected,
        *(f"--source-arg {name.split('`')[1]}=..." for name in expected if "`" in name),
    ):
        assert fragment in stderr
    for name in ("num_heads", "global_pool", "img_size"):
        assert (name in stderr) == any(name in fragment for fragment in expected)


def test_queries_normalised_by_head_tell_their_number(write, tmp_path, run):
    state = fake_state()
    for index in range(2):
        for norm in ("q_norm", "k_norm"):
            state |= {f"blocks.{index}.attn.{norm}.{part}": torch.ones(8) for part in ("weight", "bias")}
    path, out = write(state), tmp_path / "x.safetensors"
    stderr = refused(run, "convert", path, "-o", out)
    assert "global_pool" in stderr
    assert "num_heads" not in stderr
    stderr = refused(run, "convert", path, "-o", out, *GIVEN)
    assert "`--source-arg num_heads` says 4, the tensors 3" in stderr
    state["blocks.0.attn.q_norm.weight"] = torch.ones(7)
    stderr = refused(run, "convert", write(state), "-o", out, *GIVEN)
    assert "`blocks.0.attn.q_norm.weight` [7] does not divide the width 24 of `blocks.1.mlp.phi`" in stderr


WRONG_ARGUMENTS = [
    (["num_heads"], ["`--source-arg num_heads` is not KEY=VALUE"]),
    (["num_heads=4", "num_heads=6"], ["`--source-arg num_heads` is given twice"]),
    (["heads=4", "pool=avg"], ["`heads`, `pool`", "known are", "num_heads", "global_pool", "eps"]),
    (["num_heads=four"], ["num_heads=four", "a whole number"]),
    (["num_heads=5"], ["num_heads=5", "the width 24", "1, 2, 3, 4, 6, 8, 12 or 24"]),
    (["global_pool=max"], ["global_pool=max", "token, avg or ''"]),
    (["eps=2"], ["eps=2", "between 0 and 1"]),
    (["eps=nan"], ["eps=nan", "a number"]),
    (["qkv_bias=1"], ["qkv_bias=1", "true or false"]),
    (["img_size=1x2x3"], ["img_size=1x2x3"]),
    (["act_layer=relu"], ["act_layer=relu", "GELU"]),
    (["img_size=9"], ["img_size", "[9, 9]", "patches [4, 4]"]),
    (["img_size=16"], ["[16, 16] makes 16 patches of [4, 4]", "`pos_embed`", "5 rows: for 4 patches"]),
    (["img_size=8", "no_embed_class=true"], ["makes 4 patches", "5 rows: for 5 patches and none"]),
    (["num_experts=8"], ["`--source-arg num_experts` says 8, the tensors 4"]),
    (["slots_per_expert=1"], ["says 1, the tensors 2"]),
    (["moe_layer_index=0"], ["says [0, 1], the tensors [1]"]),
    (["moe_layer_index=[0,1]"], ["says [0, 1], the tensors [1]"]),
    (["patch_size=2"], ["`--source-arg patch_size` says 2, the tensors 4"]),
    (["in_chans=1", "num_classes=7", "embed_dim=12"], ["says 1,", "says 7,", "says 12,"]),
    (["mlp_ratio=4"], ["says 4.0, the tensors 2.0"]),
    (["qkv_bias=false", "qk_norm=true"], ["qkv_bias` says False, the tensors True", "qk_norm` says True"]),
    (["init_values=0.1"], ["says 'a number', the tensors None"]),
    (["class_token=false", "pre_norm=true", "fc_norm=true"], ["class_token", "pre_norm", "fc_norm"]),
    (["normalize=false"], ["says False, the tensors True"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "expected"), WRONG_ARGUMENTS, ids=lambda v: " ".join(v))
def test_arguments_that_do_not_fit(settings, expected, write, tmp_path, run):
    keys = {setting.partition("=")[0] for setting in settings}
    settings = settings + [setting for setting in GIVEN[1::2] if setting.partition("=")[0] not in keys]
    args = [word for setting in settings for word in ("--source-arg", setting)]
    stderr = refused(run, "convert", write(fake_state()), "-o", tmp_path / "x.safetensors", *args)
    for fragment in expected:
        assert fragment in stderr


def test_arguments_that_repeat_what_the_tensors_tell(write, tmp_path, run_json):
    settings = (
        "num_experts=4", "slots_per_expert=2", "moe_layer_index=1", "img_size=8x8", "patch_size=4",
        "in_chans=3", "num_classes=5", "embed_dim=24", "depth=2", "mlp_ratio=2", "qkv_bias=True",
        "qk_norm=false",
        "init_values=None", "class_token=true", "no_embed_class=false", "pre_norm=false", "fc_norm=none",
        "act_layer=GELU", "eps=1e-6", "normalize=true",
    )  # fmt: skip
    args = [word for setting in settings for word in ("--source-arg", setting)]
    found = run_json("convert", write(fake_state()), "-o", tmp_path / "x.safetensors", *GIVEN, *args)
    assert found["defaults"] == {}
    assert {setting.partition("=")[0] for setting in settings} < set(found["arguments"])


def test_a_pooled_class_token_must_be_there(write, tmp_path, run):
    state = fake_state(rows=4)
    del state["cls_token"]
    stderr = refused(run, "convert", write(state), "-o", tmp_path / "x.safetensors", *GIVEN)
    assert "global_pool=token" in stderr
    assert "`cls_token`" in stderr
    stderr = refused(run, "convert", write(state), "-o", tmp_path / "x.safetensors")
    assert "`global_pool` (avg or '')" in stderr


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
    ({"head__weight": None}, "those of a whole model: missing `head.weight`\n"),
    ({"blocks__0__mlp__fc1__weight": None}, "those of a whole model: missing `blocks.0.mlp.fc1.weight`\n"),
    (
        {f"blocks__1__mlp__experts__0__fc{i}__{part}": None for i in (1, 2) for part in ("weight", "bias")},
        "missing `blocks.1.mlp.experts.0.fc1.bias`; missing `blocks.1.mlp.experts.0.fc1.weight`; missing"
        " `blocks.1.mlp.experts.0.fc2.bias`; missing `blocks.1.mlp.experts.0.fc2.weight`\n",
    ),
    (
        {"blocks__0__norm1__weight": torch.ones(12)},
        "`blocks.0.norm1.weight` is [12], expected [24] as `blocks.1.mlp.phi` is [24, 4, 2]",
    ),
    (
        {"blocks__1__mlp__experts__3__fc1__weight": torch.ones(40, 24)},
        "`blocks.1.mlp.experts.3.fc1.weight` is [40, 24], expected [48, 24]"
        " as `blocks.1.mlp.experts.0.fc1.weight` is [48, 24]",
    ),
    ({"head__bias": torch.ones(6)}, "`head.bias` is [6], expected [5] as `head.weight` is [5, 24]"),
    ({"blocks__0__mlp__fc2__bias": torch.ones(24).int()}, "`blocks.0.mlp.fc2.bias` has the type torch.int32"),
    (
        {"norm__bias": torch.full((24,), torch.nan), "cls_token": torch.full((1, 1, 24), torch.inf)},
        "has NaN or infinite values in `cls_token`, `norm.bias`",
    ),
    ({"head__bias": torch.ones(0)}, "have no elements: `head.bias` [0]"),
    ({"blocks__999999999__norm1__weight": torch.ones(24)}, "has a block 999999999, but only"),
    ({"cls_token": torch.ones(1, 1, 24).half()}, "several types: `class_token`"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "expected"), DAMAGED, ids=lambda v: v if isinstance(v, str) else "")
def test_damaged_files(tensors, expected, write, tmp_path, run):
    path = write(changed(**tensors))
    stderr = refused(run, "convert", path, "-o", tmp_path / "x.safetensors", *GIVEN)
    assert expected in stderr


def test_a_layer_without_its_router(write, tmp_path, run):
    state = fake_state(depth=3)
    del state["blocks.1.mlp.phi"]
    out, expected = tmp_path / "x.safetensors", "those of a whole model: missing `blocks.1.mlp.phi`\n"
    assert expected in refused(run, "convert", write(state), "-o", out, *GIVEN)
    del state["blocks.2.mlp.phi"]
    stderr = refused(run, "convert", write(state), "-o", out, *GIVEN)
    assert "no Soft MoE layers" in stderr
    stderr = refused(run, "convert", write(state), "-o", out, *GIVEN, "--source", "soft-moe")
    assert "missing `blocks.1.mlp.phi`; missing `blocks.2.mlp.phi`\n" in stderr


LOOKALIKES = [
    (["layers.0.block_sparse_moe.gate.weight", "layers.0.block_sparse_moe.experts.0.w1.weight"], "top-k"),
    (["layer.1.mlp.router.classifier.weight", "layer.1.mlp.experts.expert_0.wi.weight"], "top-k"),
    (["blocks.0.mlp.w_gate", "blocks.0.mlp.experts.0.fc1.weight", "blocks.0.attn.qkv.weight"], "top-k"),
    (["moe.gate.wg.weight", "moe.experts.deepspeed_experts.0.weight"], "top-k"),
    (["attn_layers.layers.0.0.0.gamma", "attn_layers.layers.0.1.to_q.weight"], "x-transformers"),
    (["patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "`timm` without experts"),
    (["blocks.0.soft_moe.phi", "blocks.0.soft_moe.fc1_weight"], "lost its metadata"),
    (["encoder.phi", "encoder.experts.0.fc1.weight"], "inside a model that moeprune does not know"),
    (["conv1.weight"], "none of its 1 tensors matches a known layout"),
    (["gate_proj.weight"], "none of its 1 tensors matches a known layout"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "expected"), LOOKALIKES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_lookalikes_are_told_by_name(names, expected, suffix, write, tmp_path, run):
    path = write({name: torch.ones(2) for name in names}, f"x{suffix}")
    stderr = refused(run, "convert", path, "-o", tmp_path / "out.safetensors")
    assert expected in stderr
    assert "soft-moe" in stderr.split("hint: ")[1]
    if suffix == ".safetensors":
        assert expected in refused(run, "inspect", path)


def test_a_source_may_be_named(write, tmp_path, run, run_json, monkeypatch):
    path, out = write(fake_state()), tmp_path / "x.safetensors"
    stderr = refused(run, "convert", path, "-o", out, "--source", "nonsense")
    assert "`--source nonsense` is unknown" in stderr
    assert "soft-moe" in stderr
    twin = SoftMoEPackage()
    twin.name = "twin"
    monkeypatch.setitem(sources.SOURCES, "twin", twin)
    stderr = refused(run, "convert", path, "-o", out, *GIVEN)
    assert "`soft-moe` and `twin`" in stderr
    assert run_json("convert", path, "-o", out, *GIVEN, "--source", "twin")["from"] == "twin"
    monkeypatch.delitem(sources.SOURCES, "twin")
    vit = write({"blocks.0.attn.qkv.weight": torch.ones(2)}, "vit.pt")
    stderr = refused(run, "convert", vit, "-o", tmp_path / "y.safetensors", "--source", "soft-moe")
    assert "no Soft MoE layer" in stderr


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("command", ["inspect", "analyze", "prune", "eval"])
def test_other_commands_say_what_a_file_is_and_how_to_convert_it(command, suffix, write, tmp_path, run):
    path = write(fake_state(), f"theirs{suffix}")
    options = {
        "inspect": (),
        "analyze": ("--data", "digits", "-o", tmp_path / "a.safetensors"),
        "prune": ("--keep", 2, "-o", tmp_path / "p.safetensors"),
        "eval": ("--data", "digits"),
    }
    stderr = refused(run, command, path, *options[command])
    assert ("not a safetensors file" if suffix == ".pt" else "checkpoint of `soft-moe`") in stderr
    assert ("`--source`" if suffix == ".pt" else f"`moeprune convert {path} ") in stderr


def test_a_pickle_that_needs_code_is_refused_and_nothing_runs(tmp_path, run):
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    for saved in (lambda: torch.save({"x": Bomb()}, path), lambda: path.write_bytes(pickle.dumps(Bomb()))):
        saved()
        assert "evil.pt" in refused(run, "convert", path, "-o", tmp_path / "x.safetensors")
        assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.unlink(), "no file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "theirs.pt"),
        (lambda path: torch.save([1, 2], path), "theirs.pt"),
        (lambda path: torch.save({"x": 1}, path), "theirs.pt"),
    ],
)
def test_files_that_are_no_state_dict(change, expected, write, tmp_path, run):
    path = write(fake_state())
    change(path)
    assert expected in refused(run, "convert", path, "-o", tmp_path / "x.safetensors", *GIVEN)


def test_a_checkpoint_of_ours_stays(single, tmp_path, run):
    assert "a .safetensors file" in refused(run, "convert", single, "-o", tmp_path / "x.pt")
    assert "already" in refused(run, "convert", single, "-o", tmp_path / "x.safetensors")
    stderr = refused(run, "convert", single, "-o", tmp_path / "x.pt", "--to", "nonsense")
    assert "`--to nonsense`" in stderr
    assert "moeprune, soft-moe" in stderr
    for args in (("--source", "soft-moe"), GIVEN):
        stderr = refused(run, "convert", single, "-o", tmp_path / "x.pt", "--to", "soft-moe", *args)
        assert "a checkpoint of moeprune" in stderr


def test_outputs_are_checked_first(write, tmp_path, run):
    path = write(fake_state())
    assert "exists" in run("convert", path, "-o", path, *GIVEN).stderr
    out = tmp_path / "out.safetensors"
    stderr = refused(run, "convert", path, "-o", out, "--output-file", out, *GIVEN)
    assert "both" in stderr
    assert "unknown" in refused(run, "convert", path, "-o", out, "--output-format", "yaml", *GIVEN)


# --- what the library cannot express ---------------------------------------------------------------


@pytest.fixture
def ours(write, tmp_path):
    """A converted model."""
    arguments = dict(setting.split("=") for setting in GIVEN[1::2])
    conversion.convert(write(fake_state()), tmp_path / "ours.safetensors", arguments=arguments)
    return tmp_path / "ours.safetensors"


PRUNED = [
    (
        {"scope": "static", "compensate": "none"},
        "compensation none: the router still weighs the dropped experts",
    ),
    ({"scope": "static", "compensate": "mean"}, "compensation mean"),
    ({"scope": "static", "compensate": "lstsq"}, "compensation lstsq"),
    ({"scope": "input", "compensate": "renorm"}, "chooses its experts anew for each input"),
    ({"scope": "batch", "compensate": "none"}, "chooses its experts anew for each batch"),
]


@pytest.mark.parametrize(("options", "expected"), PRUNED)
def test_pruned_models_that_are_no_smaller_library_model(options, expected, ours, tmp_path, run):
    model = moeprune.load(ours)
    inputs = tmp_path / "inputs.safetensors"
    save_file({"inputs": images(model, 8).float()}, inputs)
    pruned = moeprune.prune(model, keep=2, data=str(inputs), **options)
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    stderr = refused(run, *going_back(tmp_path / "pruned.safetensors"))
    assert "layer `blocks.1.soft_moe`" in stderr
    assert expected in stderr


def test_all_experts_kept_is_unpruned(ours, tmp_path, run_json):
    pruned = moeprune.prune(moeprune.load(ours), keep=4, signal="random", compensate="none")
    moeprune.save(pruned, tmp_path / "pruned.safetensors")
    run_json("convert", tmp_path / "pruned.safetensors", "-o", tmp_path / "x.pt", "--to", "soft-moe")
    check_equal(torch.load(tmp_path / "x.pt"), fake_state())


MOE = SoftMoEConfig(24, num_experts=4, slots_per_expert=2, hidden_dim=48)
INEXPRESSIBLE = [
    ([BlockConfig(attention=False, soft_moe=MOE)], {}, "block 0 has no attention"),
    ([BlockConfig(residual=False, soft_moe=MOE)], {}, "block 0 has no residual"),
    ([BlockConfig(mlp_dim=40), BlockConfig(soft_moe=MOE)], {}, "is not the same everywhere: 40 or 48"),
    ([BlockConfig(soft_moe=SoftMoEConfig(24, 4, 2, 48, "rms"))], {}, "`router_norm` rms, expected l2"),
    ([BlockConfig(soft_moe=SoftMoEConfig(24, 4, 2, 48, "l2", "raw"))], {}, "has `dispatch_input` raw"),
    ([BlockConfig(soft_moe=MOE)], {"final_norm": False}, "neither of `final_norm` and `head_norm`"),
    ([BlockConfig(soft_moe=MOE)], {"head_norm": True}, "both of `final_norm` and `head_norm`"),
    (
        [BlockConfig(soft_moe=MOE), BlockConfig(soft_moe=SoftMoEConfig(24, 5, 3, 48))],
        {},
        "not the same everywhere: 4 or 5; the number of slots an expert is not the same everywhere: 2 or 3",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("blocks", "options", "expected"), INEXPRESSIBLE)
def test_architectures_that_the_library_has_not(blocks, options, expected, tmp_path, run):
    config = ViTConfig((8, 8), (4, 4), 3, 5, dim=24, num_heads=4, blocks=tuple(blocks), **options)
    moeprune.save(randomize(SoftMoEViT(config)), tmp_path / "ours.safetensors")
    stderr = refused(run, *going_back(tmp_path / "ours.safetensors"))
    assert expected in stderr


def test_the_shipped_models_say_what_they_said(single, vit):
    """Fields of an architecture that came later leave no trace in what is written of older models."""
    for path in (single, vit):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        written = json.loads(header["__metadata__"]["moeprune"])["architecture"]
        assert json.loads(json.dumps(vit_from_json(written).to_json())) == written
        assert moeprune.load(path).moe_layers
