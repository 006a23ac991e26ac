"""Folders of transformers whose experts lose hidden units: what is written loads, and computes what it should."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moeprune
from tests.architectures import CASES, load, model_with_images, tensors_of
from tests.language import V

pytest.importorskip("transformers")
DATA = ("--sequence-length", 16, "--device", "cpu")
WIDTHS = {name: "moe_intermediate_size" if "moe_intermediate_size" in case else "intermediate_size"
          for name, case in CASES.items()}  # fmt: skip
SHARED = {
    "deepseek_v2": "n_shared_experts", "deepseek_v3": "n_shared_experts", "glm4_moe": "n_shared_experts",
    "dots1": "n_shared_experts", "ernie4_5_moe": "moe_num_shared_experts",
}  # fmt: skip
REFUSED = {"llama4_text": "shared_expert", "hunyuan_v1_moe": "shared_mlp"}
"""One key is the width of shared experts too."""


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def differing(first: dict, second: dict) -> set[str]:
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED)))
def test_a_narrowed_folder_computes_what_was_pruned_in_memory(name, speaking, text, tmp_path):
    """Layouts: a tensor for each expert, stacked ones, transposed with alternating gates and biases; shared experts."""
    folder, written = speaking(name), tmp_path / "narrow"
    full = moeprune.load(folder)
    data = moeprune.open_data(str(text), full.input_format, sequence_length=16)
    pruned = moeprune.prune(full, data=data, width="1/2", compensate="none", device="cpu")
    moeprune.save(pruned, written)
    tokens = torch.arange(3, 27).view(2, 12)
    found = load(written)(tokens, use_cache=False).logits
    torch.testing.assert_close(found, pruned.double()(tokens), atol=1e-5, rtol=0)
    assert (found - load(folder)(tokens, use_cache=False).logits).abs().max() > 1e-3
    before, after = config_of(folder), config_of(written)
    assert after[WIDTHS[name]] == before[WIDTHS[name]] // 2
    assert differing(before, after) <= {WIDTHS[name], SHARED.get(name)}
    old, new = tensors_of(folder), tensors_of(written)
    experts = {key for key in old if "experts." in key or "put_linear" in key}
    assert all(torch.equal(tensor, new[key]) for key, tensor in old.items() if key not in experts)
    assert new.keys() == old.keys()


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "qwen3_moe"])
def test_experts_are_dropped_and_the_others_narrowed(name, speaking, text, run_json, tmp_path):
    folder, written = speaking(name), tmp_path / "narrow"
    options = ("--keep", "1/2", "--width", "1/4", "--signal", "combine")
    report = run_json("prune", folder, "--data", text, *DATA, *options, "-o", written)
    assert {(plan["k"], plan["compensation"]) for plan in report["plan"].values()} == {(4, "renorm-refit")}
    full = moeprune.load(folder)
    data = moeprune.open_data(str(text), full.input_format, sequence_length=16)
    how = {"keep": "1/2", "width": "1/4", "signal": "combine", "compensate": "renorm-refit", "device": "cpu"}
    pruned = moeprune.prune(full, data=data, **how)
    tokens = torch.arange(3, 27).view(2, 12)
    found = load(written)(tokens, use_cache=False).logits
    moeprune.save(pruned, tmp_path / "saved")
    assert all(map(torch.equal, tensors_of(tmp_path / "saved").values(), tensors_of(written).values()))
    torch.testing.assert_close(found, pruned.double()(tokens), atol=1e-5, rtol=0)
    assert report["model"]["bytes"] == sum(tensor.nbytes for tensor in tensors_of(written).values())
    card, made = (written / "README.md").read_text(), json.loads((written / "moeprune.json").read_text())
    assert "keeps 4 of 8 experts" in card
    assert f"keeps {config_of(written)[WIDTHS[name]]} hidden units" in card
    assert {plan["width"] for plan in made["plan"].values()} == {config_of(written)[WIDTHS[name]]}
    again = run_json("prune", folder, "--data", text, *DATA, "--plan", written, "-o", tmp_path / "again")
    assert again["plan"] == report["plan"]
    assert all(map(torch.equal, tensors_of(tmp_path / "again").values(), tensors_of(written).values()))


def test_by_default_no_expert_is_dropped_and_types_stay(speaking, text, run_json, run, tmp_path):
    folder = speaking("olmoe", dtype=torch.bfloat16)
    call = ("prune", folder, "--data", text, *DATA, "--width", "1/2")
    report = run_json(*call, "-o", tmp_path / "narrow")
    assert {plan["k"] for plan in report["plan"].values()} == {8}
    assert {each["compensate"] for each in report["candidates"]} == {"none", "renorm-refit"}
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "narrow").values()} == {torch.bfloat16}
    assert "keeps all of its 8 experts; each expert keeps 24" in (tmp_path / "narrow" / "README.md").read_text()
    losses = run_json("eval", tmp_path / "narrow", "--data", text, *DATA, "--baseline", folder)
    assert losses["difference"]["kl"] < 1
    report = run_json(*call, "--compensate", "renorm", "-o", tmp_path / "renorm")
    assert {plan["compensation"] for plan in report["plan"].values()} == {"renorm"}
    load(tmp_path / "renorm")


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_is_the_width_of_shared_experts_too_is_refused(name, speaking, text, run, tmp_path):
    folder = speaking(name)
    found = run("prune", folder, "--data", text, *DATA, "--width", "1/2", "-o", tmp_path / "narrow")
    assert found.code == 2
    assert "`intermediate_size`" in found.stderr
    assert REFUSED[name] in found.stderr
    assert [*tmp_path.iterdir()] == []


def test_shared_experts_of_as_many_routed_ones_keep_their_width_or_are_refused(speaking, text, run, run_json, tmp_path):
    folder = speaking("dots1")
    call = ("prune", folder, "--data", text, *DATA, "-o", tmp_path / "narrow", "--width")
    found = run(*call, "12")
    assert (found.code, "by which 16 can be divided" in found.stderr) == (2, True), found.stderr
    assert [*tmp_path.iterdir()] == []
    run_json(*call, "4", "--compensate", "none")
    after = config_of(tmp_path / "narrow")
    assert (after["moe_intermediate_size"], after["n_shared_experts"]) == (4, 4)


def test_without_shared_experts_any_width_is_possible(speaking, text, run_json, tmp_path):
    folder = speaking("deepseek_v3", n_shared_experts=0)
    run_json("prune", folder, "--data", text, *DATA, "--width", "5", "-o", tmp_path / "narrow")
    assert config_of(tmp_path / "narrow")["moe_intermediate_size"] == 5
    load(tmp_path / "narrow")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--compensate", "refit"), "give `--compensate renorm-refit`"),
        (("--keep", "1"), "runs 2 experts for each token"),
        (("--max-size", "0.1"), "is less than any plan takes"),
        (("--keep", "1/2", "--max-size", "0.5"), "exclude each other"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_before_any_pass(options, said, speaking, text, run, tmp_path):
    folder = speaking("mixtral")
    found = run("prune", folder, "--data", text, *DATA, "--width", "1/2", *options, "-o", tmp_path / "narrow")
    assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert [*tmp_path.iterdir()] == []


def test_without_data_no_hidden_unit_is_dropped(speaking, run, tmp_path):
    folder, plan = speaking("mixtral"), tmp_path / "plan.json"
    layers = {f"model.layers.{i}.block_sparse_moe": {"k": 8, "kept": [*range(8)], "width": 24} for i in range(2)}
    for given in (("--width", "1/2"), ("--width", "1/2", "--keep", "1/2", "--signal", "random"), ("--plan", plan)):
        plan.write_text(json.dumps({"schema_version": 1, "plan": layers}))
        found = run("prune", folder, *given, "-o", tmp_path / "narrow")
        assert (found.code, "needs calibration data" in found.stderr) == (2, True), found.stderr
    layers["model.layers.0.block_sparse_moe"]["width"] = 12
    plan.write_text(json.dumps({"schema_version": 1, "plan": layers}))
    found = run("prune", folder, "--plan", plan, "-o", tmp_path / "narrow")
    assert (found.code, "one width for all layers" in found.stderr) == (2, True), found.stderr
    assert [*tmp_path.iterdir()] == [plan]


def test_layers_that_predict_further_tokens_are_left_out(speaking, text, run, tmp_path):
    """They share the width, and no data reaches them."""
    folder = tmp_path / "full"
    shutil.copytree(speaking("qwen3_next"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    further = {"mtp.layers.0.mlp.gate.weight": torch.ones(8, 32)}
    further |= {f"mtp.layers.0.mlp.experts.{j}.up_proj.weight": torch.ones(16, 32) for j in range(8)}
    save_file(further, folder / "mtp.safetensors")
    index["weight_map"] |= dict.fromkeys(further, "mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    call = ("prune", folder, "--data", text, *DATA, "--width", "1/2", "--compensate", "none")
    found = run(*call, "-o", tmp_path / "narrow")
    assert (found.code, found.stderr.count("`mtp`: layers that predict further tokens")) == (0, 1), found.stderr
    assert not any(key.startswith("mtp") for key in tensors_of(tmp_path / "narrow"))
    load(tmp_path / "narrow")


def test_the_language_part_of_a_model_that_takes_images_is_narrowed(speaking, text, tmp_path):
    from transformers import AutoModelForImageTextToText

    model_with_images(vocab_size=V).save_pretrained(tmp_path / "full")
    full = moeprune.load(tmp_path / "full")
    data = moeprune.open_data(torch.arange(320).view(20, 16) % V, full.input_format)
    pruned = moeprune.prune(full, data=data, width="1/2", compensate="none", device="cpu")
    moeprune.save(pruned, tmp_path / "narrow")
    how = {"output_loading_info": True, "dtype": torch.float64, "experts_implementation": "eager"}
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "narrow", **how)
    assert not any(info.values()), info
    tokens = torch.arange(3, 27).view(2, 12)
    found = theirs.eval()(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, pruned.double()(tokens), atol=1e-5, rtol=0)
    after = config_of(tmp_path / "narrow")
    assert (after["text_config"]["moe_intermediate_size"], after["vision_config"]["intermediate_size"]) == (8, 16)
