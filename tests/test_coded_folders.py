"""Pruned folders with modelling code: what transformers and moeprune load of them is what was pruned in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.errors import MoepruneError
from moeprune.plan import LayerPlan
from tests.architectures import (
    EXPERTS,
    VOCABULARY,
    language_model,
    load,
    logits,
    model_with_images,
    saved_models,
    tensors_of,
)

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(3, 27).view(2, 12)
BLIND = ("--signal", "random", "--compensate", "none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small model of an architecture."""
    return saved_models(tmp_path_factory)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """A place for the modelling code that transformers copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> Path:
    """A file of token ids."""
    path = tmp_path_factory.mktemp("data") / "ids.npz"
    drawn = torch.randint(3, VOCABULARY, (48, 16), generator=torch.Generator().manual_seed(1))
    np.savez(path, input_ids=drawn.numpy())
    return path


@pytest.fixture(scope="module")
def coded(folder, ids, tmp_path_factory) -> Path:
    """The folder of a Qwen3-MoE with low-rank maps for dropped experts."""
    path = tmp_path_factory.mktemp("coded") / "pruned"
    moeprune.save(low_rank(folder("qwen3_moe"), ids), path)
    return path


def low_rank(folder: Path, ids: Path) -> Any:
    return moeprune.prune(moeprune.load(folder), data=str(ids), keep="1/4", compensate="low-rank", rank=4)


def trusted(folder: Path, **how: Any) -> Any:
    """What transformers loads of a folder with its code, all keys used and none missing."""
    auto = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **how)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def require_same(folder: Path, pruned: Any, tolerance: float = 1e-6) -> None:
    """Both ways to load a folder give the plan, the cost and the logits of a model in memory."""
    expected, ours = pruned(TOKENS), moeprune.load(folder)
    assert (ours.plan, ours.cost()) == (pruned.plan, pruned.cost())
    torch.testing.assert_close(ours(TOKENS), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(trusted(folder)(TOKENS, use_cache=False).logits, expected, atol=tolerance, rtol=0)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "minimax_m2", "gpt_oss"])
def test_a_folder_with_code_is_the_model_that_was_pruned_in_memory(name, folder, ids, run_json, tmp_path):
    """Layouts: a tensor for each expert; groups, shared experts and a bias of the choice; renamed layers; stacks."""
    call = ("prune", folder(name), "--data", ids, "--keep", "1/4", "--compensate", "low-rank", "--rank", 4)
    report = run_json(*call, "-o", tmp_path / "pruned")
    pruned = low_rank(folder(name), ids)
    require_same(tmp_path / "pruned", pruned)
    assert report["form"] == "custom-code"
    inspected = run_json("inspect", tmp_path / "pruned")
    assert {key: inspected[key] for key in report["model"]} == report["model"]
    before, after = tensors_of(folder(name)), tensors_of(tmp_path / "pruned")
    assert report["model"]["bytes"] == sum(tensor.nbytes for tensor in after.values())
    same = [key for key in before if "experts." not in key or "shared" in key]
    assert all(torch.equal(after[key], before[key]) for key in same)
    assert {key.rpartition(".")[2] for key in after.keys() - before.keys()} >= {"low_rank_in", "low_rank_out"}
    model = trusted(tmp_path / "pruned")
    assert model.generate(TOKENS[:1], min_new_tokens=3, max_new_tokens=3, pad_token_id=0).shape == (1, 15)


@pytest.mark.parametrize("how", ["none", "mean", "lstsq", "affine", "linear"])
def test_all_compensations_of_a_layer_can_be_written(how, folder, ids, tmp_path):
    amount = {} if how == "linear" else {"keep": "1"}
    pruned = moeprune.prune(moeprune.load(folder("deepseek_v3")), data=str(ids), compensate=how, **amount)
    moeprune.save(pruned, tmp_path / "pruned")
    require_same(tmp_path / "pruned", pruned)


def test_layers_differ_in_what_they_keep_and_may_keep_none(folder, ids, tmp_path):
    full = moeprune.load(folder("qwen3_moe"))
    names = [*full.config.moe_layers]
    plans = {
        "none kept": {name: LayerPlan("static", 0, EXPERTS, "gram", "low-rank", (), rank=4) for name in names},
        "uneven": {name: LayerPlan("static", 1 + i, EXPERTS, "gram", "affine") for i, name in enumerate(names)},
        "one layer": {names[1]: LayerPlan("static", 2, EXPERTS, "gram", "mean")},
    }
    for case, plan in plans.items():
        pruned = moeprune.prune(full, data=str(ids), plan=plan)
        moeprune.save(pruned, tmp_path / case)
        require_same(tmp_path / case, pruned)


def test_hidden_units_can_be_dropped_too(folder, ids, tmp_path):
    full = moeprune.load(folder("qwen3_moe"))
    for how in ({"keep": "1/4", "compensate": "low-rank", "rank": 2}, {"compensate": "affine"}):
        pruned = moeprune.prune(full, data=str(ids), width="1/2", **how)
        moeprune.save(pruned, tmp_path / how["compensate"])
        require_same(tmp_path / how["compensate"], pruned)


@pytest.mark.parametrize("name", ["deepseek_v3", "granitemoe", "gpt_oss", "llama4_text"])
def test_without_compensation_it_is_the_full_model_whose_dropped_experts_give_zero(name, folder, run_json, tmp_path):
    report = run_json("prune", folder(name), "--keep", "3", *BLIND, "-o", tmp_path / "pruned")
    full = load(folder(name))
    blocks = [module for module in full.modules() if hasattr(getattr(module, "experts", None), "down_proj")]
    for block, plan in zip(blocks, report["plan"].values(), strict=True):
        dropped = sorted({*range(EXPERTS)} - {*plan["kept"]})
        for key, tensor in block.experts.named_parameters():
            if key.startswith("down_proj"):
                tensor.data[dropped] = 0
    expected = logits(full)
    assert (expected - logits(load(folder(name)))).abs().max() > 1e-3
    found = logits(trusted(tmp_path / "pruned", dtype=torch.float64))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_type_of_weights_is_kept(ids, tmp_path):
    language_model("qwen3_moe").bfloat16().save_pretrained(tmp_path / "full")
    moeprune.save(low_rank(tmp_path / "full", ids), tmp_path / "pruned")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "pruned").values()} == {torch.bfloat16}
    for dtype in (torch.bfloat16, torch.float32):
        model = trusted(tmp_path / "pruned", dtype=dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    ours, theirs = moeprune.load(tmp_path / "pruned"), logits(model)
    torch.testing.assert_close(ours(TOKENS), model(TOKENS, use_cache=False).logits, atol=1e-5, rtol=0)
    assert ours.cost().bytes == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "pruned").values())
    assert (logits(model.to(torch.float64)) - theirs).abs().max() < 1e-3  # layers follow their tensors


def test_it_is_inspected_evaluated_and_not_pruned_again(coded, folder, ids, run, run_json, tmp_path):
    full = folder("qwen3_moe")
    inspected = run_json("inspect", coded)
    assert {layer["plan"]["compensation"] for layer in inspected["layers"].values()} == {"low-rank"}
    assert inspected["architecture"]["model_type"] == "qwen3_moe"
    assert inspected["bytes_by_part"]["compensation"] > 0
    assert inspected["flops_per_input"]["compensation"] > 0
    found = run_json("eval", coded, "--data", ids, "--baseline", full)
    assert {name: shift["is_shifted"] for name, shift in found["shift"].items()} == dict.fromkeys(
        inspected["layers"], False
    )
    assert found["difference"]["kl"] > 0
    for how in (("--data", ids), BLIND):
        again = run("prune", coded, "--keep", "1", *how, "-o", tmp_path / "again")
        assert (again.code, "are already pruned" in again.stderr) == (2, True), again.stderr
    assert not (tmp_path / "again").exists()
    run_json("prune", full, "--plan", coded, "--data", ids, "-o", tmp_path / "same")
    assert all(torch.equal(tensor, tensors_of(coded)[name]) for name, tensor in tensors_of(tmp_path / "same").items())
    moeprune.save(moeprune.load(coded), tmp_path / "copy")
    files = {file.name: file.read_bytes() for file in coded.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()} == files


def test_without_trust_nothing_of_transformers_loads_it(coded, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto.from_pretrained(coded, trust_remote_code=False)
    assert not type(trusted(coded)).is_backend_compatible()  # what vLLM asks


def test_a_config_that_asks_for_router_logits_is_read(coded, folder, tmp_path):
    for name, source in (("full", folder("qwen3_moe")), ("pruned", coded)):
        shutil.copytree(source, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"output_router_logits": True}))
        torch.testing.assert_close(moeprune.load(tmp_path / name)(TOKENS), moeprune.load(source)(TOKENS))
    assert torch.equal(logits(trusted(tmp_path / "pruned")), logits(trusted(coded)))


def test_transformers_saves_what_it_has_loaded(coded, tmp_path):
    model = trusted(coded)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(trusted(tmp_path / "saved")), logits(model))
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(coded).keys()
    ours = moeprune.load(tmp_path / "saved")
    assert ours.plan == moeprune.load(coded).plan
    torch.testing.assert_close(ours(TOKENS), model(TOKENS, use_cache=False).logits, atol=1e-6, rtol=0)


def test_files_and_the_card_say_what_it_takes(coded, folder, ids, run, tmp_path):
    code = (coded / "modeling_moeprune.py").read_text()
    assert 'pruned_classes("qwen3_moe", "AutoModelForCausalLM", __name__)' in code
    card = (coded / "README.md").read_text()
    assert "keeps 2 of 8 experts" in card
    assert "`trust_remote_code=True`; vLLM does not load it" in card
    assert "`low-rank` of rank 4" in card
    call = ("prune", folder("qwen3_moe"), "--data", ids, "--keep", "1/2", "-o", tmp_path / "pruned")
    found = run(*call)
    assert "drop-in: whatever loads the full model loads it" in found.stdout
    assert "drop-in" in (tmp_path / "pruned" / "README.md").read_text()
    assert not (tmp_path / "pruned" / "modeling_moeprune.py").exists()
    coded_too = run(*call, "--compensate", "mean", "--force")
    assert "custom code: it runs with transformers and moeprune installed" in coded_too.stdout


def without(*keys: str):
    """Leave out the tensors whose names end in some keys, from shards and index."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        for file in folder.glob("*.safetensors"):
            kept = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(keys)}
            save_file(kept, file)
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.endswith(keys)}
        path.write_text(json.dumps(index))

    return change


def reshaped(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("low_rank_in"))
    save_file(tensors | {name: tensors[name][..., :-1].contiguous()}, file)


def written(file: str, text: str):
    def change(folder: Path) -> None:
        (folder / file).write_text(text)

    return change


def plan_with(file: str, **changes: Any):
    """Change the plan of the first layer, or leave out what is None."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        plans = content["moeprune"]["plan"] if file == "config.json" else content["plan"]
        plans["model.layers.0.mlp"] |= changes
        (folder / file).write_text(json.dumps(content))

    return change


def without_plan(folder: Path) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    del content["moeprune"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("low_rank_in"), "lacks `model.layers.0.mlp.compensation.low_rank_in`"),
        (without("experts.1.up_proj.weight"), "lacks `model.layers.0.mlp.experts.1.up_proj.weight`"),
        (without("up_proj.weight", "gate_proj.weight", "down_proj.weight"), "lacks the experts of layer"),
        (without("mlp.gate.weight"), "has experts and no router"),
        (without("norm.weight"), "lacks tensors that transformers expects: `model."),
        (reshaped, "transformers cannot build"),
        (written("moeprune.json", "{"), "is not JSON"),
        (written("moeprune.json", "[]"), "has another plan than `config.json`"),
        (plan_with("moeprune.json", kept=[0, 1]), "has another plan than `config.json`"),
        (plan_with("config.json", kept=[0]), "`kept` is [0], expected 2 different experts"),
        (plan_with("config.json", kept=None), "lacks `kept`"),
        (plan_with("config.json", num_experts=9), "`ranks` has 6 numbers, expected 7: one for each map"),
        (plan_with("config.json", ranks=None), "lacks `ranks`"),
        (plan_with("config.json", compensation="nonsense"), ": expected one of none, renorm, mean,"),
        (without_plan, "`moeprune`: plan: found NoneType"),
    ],
)
def test_damaged_folders_are_refused(damage, said, coded, run, tmp_path):
    shutil.copytree(coded, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(MoepruneError) as error:
        moeprune.load(tmp_path / "damaged")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep", "1/4", "--compensate", "refit"), "give `--compensate renorm-refit`"),
        (("--keep", "1/4", "--compensate", "low-rank", "--rank", "99"), "has 32 directions, the plan has rank 99"),
        (("--keep", "1/4", "--compensate", "affine", "--scope", "input"), "scope static only"),
        (("--plan", "mixed"), "compensation `renorm` in some layers and `affine` in others"),
    ],
)
def test_what_no_folder_can_hold_is_refused_before_any_pass(options, said, folder, ids, run, tmp_path):
    plan = {f"model.layers.{i}.mlp": {"k": 2, "compensation": how} for i, how in enumerate(("renorm", "affine"))}
    (tmp_path / "mixed").write_text(json.dumps({"schema_version": 1, "plan": plan}))
    options = [tmp_path / "mixed" if option == "mixed" else option for option in options]
    found = run("prune", folder("qwen3_moe"), "--data", ids, *options, "-o", tmp_path / "pruned")
    assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert not (tmp_path / "pruned").exists()


def test_quantised_folders_take_no_compensation(folder, run, tmp_path):
    source = tmp_path / "full"
    shutil.copytree(folder("mixtral"), source)
    settings = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(settings))
    found = run("prune", source, "--keep", "1/4", *BLIND, "-o", tmp_path / "pruned")
    assert (found.code, "are quantised" in found.stderr) == (2, True), found.stderr


def test_the_language_part_of_a_model_that_takes_images_is_pruned(ids, tmp_path):
    auto = transformers.AutoModelForImageTextToText
    model_with_images().save_pretrained(tmp_path / "full")
    pruned = low_rank(tmp_path / "full", ids)
    moeprune.save(pruned, tmp_path / "pruned")
    expected = pruned(TOKENS)
    torch.testing.assert_close(moeprune.load(tmp_path / "pruned")(TOKENS), expected, atol=1e-6, rtol=0)
    model, info = auto.from_pretrained(tmp_path / "pruned", trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    found = model.eval()(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
