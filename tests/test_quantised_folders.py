"""Folders whose weights are in FP8 blocks or in MXFP4: opened, sliced, refitted and narrowed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models.folders import quantised
from tests.architectures import language_model, tensors_of
from tests.language import V

pytest.importorskip("transformers")
BLIND = ("--signal", "random", "--compensate", "renorm")


def in_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in FP8, its scales, and what they stand for: a loop over blocks, written independently."""
    low, whole = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[place].abs().max() / 448
            low[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            whole[place] = low[place].float() * scales[i, j]
    return low, scales, whole


def rewrite(folder: Path, tensors: dict[str, Tensor], settings: dict | None) -> Path:
    """Write other tensors into a folder, in two shards, and what its config says about them."""
    for file in folder.glob("model*"):
        file.unlink()
    names, shards = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for number, shard in enumerate(shards):
        save_file({name: tensors[name].contiguous() for name in names[number::2]}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shards[place % 2] for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text()) | ({"quantization_config": settings} if settings else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_fp8(path: Path, name: str, block: tuple[int, int], **settings: int) -> tuple[Path, Path]:
    """The folder of a model in FP8, and one of the same weights in float32."""
    for kind in ("quantised", "whole"):
        language_model(name, vocab_size=V, **settings).save_pretrained(path / kind)
    low, whole = tensors_of(path / "quantised"), tensors_of(path / "whole")
    for key in list(low):
        if key.endswith("_proj.weight") or ".experts." in key:
            low[key], low[f"{key}_scale_inv"], whole[key] = in_blocks(low[key], block)
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return rewrite(path / "quantised", low, how), rewrite(path / "whole", whole, None)


def in_mxfp4(path: Path) -> Path:
    """The folder of a small gpt-oss of random bits."""
    language_model("gpt_oss", vocab_size=V, intermediate_size=32).save_pretrained(path)
    tensors = tensors_of(path)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        n, columns, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(256, (n, rows, columns // 32, 16)).to(torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(122, 126, (n, rows, columns // 32)).to(torch.uint8)
    return rewrite(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of token ids."""
    path = tmp_path_factory.mktemp("text") / "ids.safetensors"
    save_file({"input_ids": torch.randint(V, (24, 16), generator=torch.Generator().manual_seed(1))}, path)
    return path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """The folder of a Qwen3-MoE in FP8, and one of the same weights in float32."""
    return in_fp8(tmp_path_factory.mktemp("fp8"), "qwen3_moe", (8, 8))


@pytest.mark.parametrize(("name", "block"), [("deepseek_v3", (8, 8)), ("minimax_m2", (12, 10))])
def test_fp8_is_opened_as_what_it_stands_for(name, block, tmp_path):
    """Blocks may be cut off at the edges; scales may be in another shard than their weights."""
    source, whole = in_fp8(tmp_path, name, block)
    tokens = torch.arange(3, 27).view(2, 12)
    torch.testing.assert_close(moeprune.load(source)(tokens), moeprune.load(whole)(tokens), atol=0, rtol=0)


def test_mxfp4_is_opened_as_transformers_opens_it(tmp_path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    source, tokens = in_mxfp4(tmp_path / "full"), torch.arange(3, 27).view(2, 12)
    how = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager", **how).eval()
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(moeprune.load(source)(tokens), expected, atol=1e-4, rtol=0)


def test_experts_without_new_weights_are_copied_with_their_scales(fp8, text, run_json, tmp_path):
    for source in (fp8[0], in_mxfp4(tmp_path / "mxfp4")):
        before = tensors_of(source)
        ways = {"blind": BLIND, "measured": ("--data", text, "--compensate", "renorm")}
        for name, options in ways.items():
            target = tmp_path / f"{source.name} {name}"
            report = run_json("prune", source, "--keep", "1/2", *options, "-o", target)
            after = tensors_of(target)
            kept = report["plan"]["model.layers.0.mlp"]["kept"]
            for key, tensor in before.items():
                if "layers.0.mlp.experts." in key:
                    number = key.split(".experts.")[1].split(".")[0]
                    if number.isdigit() and int(number) in kept:
                        new = key.replace(f"experts.{number}", f"experts.{kept.index(int(number))}")
                        assert torch.equal(after[new].view(torch.uint8), tensor.view(torch.uint8))
                    elif not number.isdigit():
                        assert torch.equal(after[key], tensor[kept])


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("options", [("--keep", "1/2"), ("--width", "1/2")])
def test_changed_experts_are_in_blocks_of_fp8_again(options, fp8, text, run_json, tmp_path):
    """The refitted model of the same weights in float32 is what they are rounded from."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    source, whole = fp8
    for folder in fp8:
        run_json("prune", folder, "--data", text, *options, "-o", tmp_path / folder.name)
    low, expected = tensors_of(tmp_path / source.name), tensors_of(tmp_path / whole.name)
    assert {key for key in low if not key.endswith("_scale_inv")} == set(expected)
    same, theirs = tensors_of(source), Fp8Dequantize(None)._dequantize_one
    for key, tensor in low.items():
        if f"{key}_scale_inv" not in low:
            continue
        assert tensor.dtype == torch.float8_e4m3fn
        found, near = theirs(tensor, low[f"{key}_scale_inv"], torch.float32), expected[key]
        if "self_attn" in key:
            assert torch.equal(tensor.view(torch.uint8), same[key].view(torch.uint8))
        scale = near.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).abs().amax((1, 3)) / 448
        tiny = scale.repeat_interleave(8, 0).repeat_interleave(8, 1) * 2.0**-9
        assert ((found - near).abs() <= near.abs() / 16 + tiny + 1e-6).all(), key
    config = json.loads((tmp_path / source.name / "config.json").read_text())
    assert config["quantization_config"] == json.loads((source / "config.json").read_text())["quantization_config"]
    assert "rounded to FP8 in blocks of 8 × 8 anew" in (tmp_path / source.name / "README.md").read_text()
    result = run_json("eval", tmp_path / source.name, "--data", text, "--baseline", tmp_path / whole.name)
    assert result["difference"]["kl"] < 0.01


def test_budgets_narrow_experts_by_whole_blocks(text, run_json, tmp_path):
    folder, _ = in_fp8(tmp_path, "qwen3_moe", (16, 16), moe_intermediate_size=48)
    made = run_json("prune", folder, "--data", text, "--max-flops", "97%", "-o", tmp_path / "out")
    widths = {width for each in made["candidates"] for width in (each["width"] or {}).values()}
    assert widths
    assert widths <= {16, 32}
    assert made["model"]["flops_per_input"]["total"] <= 0.97 * made["full_model"]["flops_per_input"]["total"]


@pytest.mark.parametrize(
    ("block", "dtype"), [((8, 8), torch.float32), ((12, 10), torch.bfloat16), (None, torch.float32)]
)
def test_rounding_to_fp8_and_back_is_near(block, dtype):
    weight = torch.randn(3, 20, 33, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 4)[:, None, None]
    weight[1] = 0
    for has_powers in (False, True):
        how = quantised.Quantisation("fp8", block, has_powers)
        low, scales = quantised.to_fp8(weight, how, dtype)
        again = quantised.from_fp8(low, scales, block)
        assert ((again - weight).abs() <= weight.abs() / 14 + weight.abs().max() / 448 / 256).all()
        assert not has_powers or torch.equal(scales.float().log2(), scales.float().log2().round())


def test_what_quantised_weights_cannot_be_is_refused(fp8, text, run, tmp_path):
    folder = in_mxfp4(tmp_path / "mxfp4")
    cases = {
        "give `--keep` with `--compensate renorm`": (folder, "--keep", "1/2"),
        "would lose what the fit gains": (folder, "--width", "1/2"),
        "give a multiple of 8": (fp8[0], "--width", "12"),
    }
    for said, call in cases.items():
        found = run("prune", *call, "--data", text, "-o", tmp_path / "pruned")
        assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"quant_method": "gptq"}, lambda name, tensor: tensor, "quantised by `gptq`"),
        ({"quant_method": "fp8", "weight_block_size": 8}, lambda name, tensor: tensor, "in blocks of 8"),
        ({}, lambda name, tensor: None if "q_proj.weight_scale_inv" in name else tensor, "the scales of `model.layers"),
        ({}, lambda name, tensor: tensor[:1] if name.endswith("_scale_inv") else tensor, "has scales of shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_dequantised_is_refused(settings, change, said, fp8, tmp_path):
    source = shutil.copytree(fp8[0], tmp_path / "full")
    changed = {name: change(name, tensor) for name, tensor in tensors_of(source).items()}
    known = json.loads((source / "config.json").read_text())["quantization_config"]
    rewrite(source, {name: tensor for name, tensor in changed.items() if tensor is not None}, settings or known)
    with pytest.raises(MoepruneError, match=said):
        moeprune.load(source)
