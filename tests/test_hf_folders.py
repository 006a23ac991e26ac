"""Folders of transformers, pruned tensor by tensor: what is written loads, and computes what it should."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import moeprune
from moeprune.errors import MoepruneError
from moeprune.models.folders.layout import INDEX, read_folder
from tests.architectures import CASES, EXPERTS, forbid, language_model, load, logits, saved_models, tensors_of
from tests.peers import has

needs_transformers = pytest.mark.skipif(not has("transformers"), reason="transformers is not installed")
BLIND = ("--signal", "random", "--compensate", "renorm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small model of an architecture."""
    return saved_models(tmp_path_factory)


def made_by_hand(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder with some tensors, whatever transformers makes of them."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "made_by_hand", **config}))
    return folder


def layer_of(prefix: str, experts: int = 4, d: int = 6, h: int = 8) -> dict[str, torch.Tensor]:
    """An MoE layer with a tensor for each expert, of values that tell experts apart."""
    made = {f"{prefix}.gate.weight": torch.arange(experts).float()[:, None].expand(-1, d).contiguous()}
    for j in range(experts):
        made[f"{prefix}.experts.{j}.up_proj.weight"] = torch.full((h, d), float(j))
        made[f"{prefix}.experts.{j}.down_proj.weight"] = torch.full((d, h), float(j))
    return made


def plan_file(path: Path, kept: dict[str, list[int]]) -> Path:
    layers = {name: {"kept": experts, "compensation": "renorm"} for name, experts in kept.items()}
    path.write_text(json.dumps({"schema_version": 1, "plan": layers}))
    return path


@pytest.mark.mostly_slow(5)
@needs_transformers
@pytest.mark.parametrize("name", CASES)
def test_a_pruned_folder_is_the_full_model_without_the_dropped_experts(name, folder, run_json, tmp_path):
    """Groups of experts are of one size, and biases above 0: there too the mask is exact."""
    report = run_json("prune", folder(name), "--keep", "1/2", *BLIND, "-o", tmp_path / "pruned")
    full = load(folder(name))
    whole, modules = logits(full), dict(full.named_modules())
    kept = {
        layer if layer in modules else layer.replace("block_sparse_moe", "mlp"): plan["kept"]
        for layer, plan in report["plan"].items()
    }
    assert set(kept) <= set(modules)
    expected = logits(forbid(full, kept))
    assert (expected - whole).abs().max() > 1e-3
    torch.testing.assert_close(logits(load(tmp_path / "pruned")), expected, atol=1e-6, rtol=0)


@needs_transformers
def test_files_of_a_folder_are_rebuilt_or_copied(folder, printed, tmp_path):
    source, target = tmp_path / "my model", tmp_path / "pruned"
    shutil.copytree(folder("mixtral"), source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# My model\n")
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").symlink_to(source / "tokenizer.json")
    (source / "assets").mkdir()
    (source / "assets" / "figure.svg").write_text("<svg/>")
    half = language_model("mixtral").half()
    shutil.rmtree(source / "gone", ignore_errors=True)
    half.save_pretrained(source, max_shard_size="40KB")
    kept = {f"model.layers.{i}.block_sparse_moe": [1, 4, 6] for i in range(2)}
    printed("prune", source, "--plan", plan_file(tmp_path / "plan.json", kept), "-o", target)
    before, after = tensors_of(source), tensors_of(target)
    for i in range(2):
        prefix = f"model.layers.{i}.block_sparse_moe"
        assert torch.equal(after[f"{prefix}.gate.weight"], before[f"{prefix}.gate.weight"][[1, 4, 6]])
        for new, old in enumerate([1, 4, 6]):
            for part in ("w1", "w2", "w3"):
                ours, theirs = (f"{prefix}.experts.{j}.{part}.weight" for j in (new, old))
                assert torch.equal(after.pop(ours), before[theirs])
    assert not any(".experts." in name for name in after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if "gate" not in name)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    index = json.loads((target / INDEX).read_text())
    after = tensors_of(target)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name, file in index["weight_map"].items():
        with safe_open(target / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 (not a dict)
    assert set(index["weight_map"]) == set(after)
    shards = sorted({*index["weight_map"].values()})
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    others = {"config.json", "generation_config.json", "README.md", "moeprune.json", INDEX, "assets"}
    assert {file.name for file in target.iterdir()} == {*shards, *others, "tokenizer.json", "tokenizer_config.json"}
    assert (target / "tokenizer_config.json").read_text() == "{}"
    assert not (target / "tokenizer_config.json").is_symlink()
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# My model\n\n## Pruned with moeprune")
    assert "Made from `my model`. Each of its 2 MoE layers keeps 3 of 8 experts" in card
    again = tmp_path / "again"
    printed("prune", source, "--plan", target, "-o", again)
    for file in target.rglob("*"):
        assert file.is_dir() or file.read_bytes() == (again / file.relative_to(target)).read_bytes()
    printed("prune", source, "--keep", "1.0", *BLIND, "-o", tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == (source / "README.md").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(tmp_path / "same").items())


def test_layers_that_predict_further_tokens_are_left_out(run, tmp_path):
    """They share the count, and no forward pass reaches them to choose by data."""
    tensors = layer_of("model.layers.0.mlp") | layer_of("model.layers.1.mlp") | layer_of("mtp.layers.0.mlp")
    tensors |= {"model.layers.1.eh_proj.weight": torch.ones(2, 2), "mtp.fc.weight": torch.ones(2, 2)}
    sizes = {"num_experts": 4, "num_hidden_layers": 1, "num_nextn_predict_layers": 1, "use_mtp": True}
    source = made_by_hand(tmp_path / "full", tensors, **sizes)
    found = run("prune", source, "--keep", "2", *BLIND, "-o", tmp_path / "pruned")
    assert (found.code, found.stderr.count("`model.layers.1.`, `mtp`")) == (0, 1)
    after = tensors_of(tmp_path / "pruned")
    assert {name.split(".mlp")[0] for name in after} == {"model.layers.0"}
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["use_mtp"], config["num_experts"]) == (0, False, 2)
    assert run("prune", source, "--keep", "1.0", *BLIND, "-o", tmp_path / "same").code == 0
    assert tensors_of(tmp_path / "same").keys() == tensors.keys()


def test_scales_travel_with_their_experts_and_every_layout_is_cut(printed, tmp_path):
    """FP8 blocks of single experts, MXFP4 of gpt-oss, flattened experts of DBRX, a bias of shape (1,n), a text part."""
    n, kept = 4, [0, 3]
    single = layer_of("model.layers.0.mlp")
    for j in range(n):
        name = f"model.layers.0.mlp.experts.{j}.up_proj.weight"
        single[name] = single[name].to(torch.float8_e4m3fn)
        single[f"{name}_scale_inv"] = torch.full((1, 1), 10.0 + j)
    single["model.layers.0.mlp.moe_statics.e_score_correction_bias"] = torch.arange(4.0)[None]
    stacked = {
        "model.language_model.layers.0.mlp.experts.gate_up_proj_blocks": torch.arange(n * 6).byte().view(n, 3, 2),
        "model.language_model.layers.0.mlp.experts.gate_up_proj_scales": torch.arange(n * 3).byte().view(n, 3),
        "model.language_model.layers.0.mlp.experts.gate_up_proj_bias": torch.arange(n * 3.0).view(n, 3),
        "model.language_model.layers.0.mlp.router.weight": torch.arange(n * 3.0).view(n, 3),
        "model.language_model.layers.0.mlp.router.bias": torch.arange(n * 1.0),
        "model.visual.blocks.0.mlp.gate.weight": torch.ones(n, 3),
    }
    flat = {
        "transformer.blocks.0.ffn.experts.mlp.w1": torch.arange(n * 5 * 3.0).view(n * 5, 3),
        "transformer.blocks.0.ffn.router.layer.weight": torch.arange(n * 3.0).view(n, 3),
    }
    cases = {
        "single": (single, "model.layers.0.mlp", {"num_experts": n}),
        "stacked": (stacked, "model.language_model.layers.0.mlp", {"text_config": {"num_local_experts": n}}),
        "flat": (flat, "transformer.blocks.0.ffn", {"ffn_config": {"moe_num_experts": n}}),
    }
    for case, (before, layer, config) in cases.items():
        source = made_by_hand(tmp_path / case, before, **config)
        plan = plan_file(tmp_path / f"{case}.json", {layer: kept})
        printed("prune", source, "--plan", plan, "-o", tmp_path / f"{case} pruned")
        after = tensors_of(tmp_path / f"{case} pruned")
        for name, tensor in before.items():
            number = name.partition(".experts.")[2].partition(".")[0]
            if "visual" in name:
                assert torch.equal(after[name], tensor)
            elif number.isdigit():
                if int(number) in kept:
                    renamed = name.replace(f"experts.{number}", f"experts.{kept.index(int(number))}")
                    assert torch.equal(after[renamed].float(), tensor.float())
                    assert after[renamed].dtype == tensor.dtype
            elif "moe_statics" in name:
                assert torch.equal(after[name], tensor[:, kept])
            else:
                rows = tensor.unflatten(0, (n, -1))[kept].flatten(0, 1)
                assert torch.equal(after[name], rows.reshape(-1, *tensor.shape[1:])), name
        text = (source / "config.json").read_text().replace(f": {n}", f": {len(kept)}")
        assert json.loads((tmp_path / f"{case} pruned" / "config.json").read_text()) == json.loads(text)


def test_groups_stay_equal_or_become_one(run, printed, tmp_path):
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
    source = made_by_hand(tmp_path / "full", layer_of("model.layers.0.mlp", 8), **sizes)
    for keep, said in (("5", "2 groups of experts, which stay equal"), ("2", "runs 3 experts for each token")):
        found = run("prune", source, "--keep", keep, *BLIND, "-o", tmp_path / "pruned")
        assert (found.code, said in found.stderr) == (2, True)
    uneven = plan_file(tmp_path / "plan.json", {"model.layers.0.mlp": [0, 1, 2, 3, 4, 5]})
    found = run("prune", source, "--plan", uneven, "-o", tmp_path / "pruned")
    assert (found.code, "4, 2 experts of them" in found.stderr) == (2, True)
    assert not (tmp_path / "pruned").exists()
    printed("prune", source, "--keep", "6", *BLIND, "-o", tmp_path / "six")
    config = json.loads((tmp_path / "six" / "config.json").read_text())
    assert (config["n_routed_experts"], config["n_group"], config["topk_group"]) == (6, 2, 1)
    [plan] = json.loads((tmp_path / "six" / "moeprune.json").read_text())["plan"].values()
    assert sum(j < 4 for j in plan["kept"]) == 3
    found = run("prune", source, "--keep", "4", *BLIND, "-o", tmp_path / "four")
    assert (found.code, "2 groups become one" in found.stderr) == (0, True)
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (1, 1)


def drop_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()


def truncate(folder: Path) -> None:
    shard = max(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])


def without(*parts: str):
    """Rewrite the folder as one file, without the tensors whose names have a part."""

    def change(folder: Path) -> None:
        tensors = tensors_of(folder)
        for file in folder.glob("model*"):
            file.unlink()
        kept = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}
        save_file(kept, folder / "model.safetensors")

    return change


def config(**changes: Any):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"}))

    return change


@needs_transformers
@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (drop_shard, (), "lacks shards that its index names: `model-00001"),
        (truncate, (), "is not a safetensors file, or a truncated one"),
        (without(".experts.", ".gate."), (), "no MoE layers in"),
        (without(".experts.3.w1"), (), "lacks `model.layers.0.block_sparse_moe.experts.3.w1.weight`"),
        (without(".gate."), (), "has experts and no router"),
        (config(num_local_experts=16), (), "lacks `model.layers.0.block_sparse_moe.experts.8.w"),
        (config(num_local_experts=4), (), "has 8 experts, `config.json` says 4"),
        (config(num_local_experts="gone"), (), "has no number of experts"),
        (config(num_local_experts=None), (), "has no number of experts"),
        (config(num_experts=4), (), "several numbers of experts: [4, 8]"),
        (config(quantization_config={"ignore": ["experts.1.w1"]}), (), "names single experts"),
        (lambda folder: (folder / INDEX).write_text("{"), (), "is not JSON"),
        (None, ("--keep", "1", *BLIND), "runs 2 experts for each token, the plan keeps 1"),
        (None, ("--keep", "9", *BLIND), "more than the 8 experts"),
        (None, ("--keep", "1/2", "--signal", "gram", "--compensate", "renorm"), "needs calibration data"),
        (None, ("--keep", "1/2", "--signal", "random", "--compensate", "affine"), "`affine` needs calibration data"),
        (None, ("--max-flops", "0.5", *BLIND), "needs calibration data"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_written(damage, options, said, folder, run, tmp_path):
    source = tmp_path / "full"
    shutil.copytree(folder("mixtral"), source)
    if damage is not None:
        damage(source)
    found = run("prune", source, *(options or ("--keep", "1/2", *BLIND)), "-o", tmp_path / "pruned")
    assert (found.code, found.stdout) == (2, "")
    assert said in found.stderr, found.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"model.layers.0.mlp": [0, 1]}, "leaves out layers `model.layers.1.mlp`"),
        ({"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [0]}, "keeps 1 to 2 experts"),
        ({"model.layers.0.mlp": [0, 4], "model.layers.1.mlp": [0, 1]}, "different experts below 4"),
        ({"model.layers.7.mlp": [0]}, "plan of `model.layers.7.mlp`"),
    ],
)
def test_a_plan_must_fit_the_folder(kept, said, run, tmp_path):
    tensors = layer_of("model.layers.0.mlp") | layer_of("model.layers.1.mlp")
    source = made_by_hand(tmp_path / "full", tensors, num_experts=4)
    found = run("prune", source, "--plan", plan_file(tmp_path / "plan.json", kept), "-o", tmp_path / "pruned")
    assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    "odd",
    [
        {"model.layers.0.mlp.experts.wi": torch.ones(6, 4)},
        {"model.layers.0.mlp.experts.expert_0.wi.weight": torch.ones(8, 6)},
        {"model.layers.0.mlp.gate.tid2eid": torch.ones(64, 2).long()},
        {"model.layers.0.mlp.gate.bias": torch.ones(5)},
    ],
)
def test_an_unknown_layout_is_refused(odd, run, tmp_path):
    source = made_by_hand(tmp_path / "full", layer_of("model.layers.0.mlp") | odd, num_experts=4)
    found = run("prune", source, "--keep", "1/2", *BLIND, "-o", tmp_path / "pruned")
    assert (found.code, "layout of its MoE layers is unknown" in found.stderr) == (2, True)
    assert next(iter(odd)) in found.stderr


def test_only_folders_of_models_are_replaced_and_only_when_asked_to(run, tmp_path):
    source = made_by_hand(tmp_path / "full", layer_of("model.layers.0.mlp"), num_experts=4)
    call, target = ("prune", source, "--keep", "1/2", *BLIND, "-o"), tmp_path / "pruned"
    assert run(*call, target).code == 0
    (target / "old").write_text("")
    found = run(*call, target)
    assert (found.code, "exists" in found.stderr, (target / "old").exists()) == (2, True, True)
    assert run(*call, target, "--force").code == 0
    assert not (target / "old").exists()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "mine.txt").write_text("")
    refused = {"papers": "is not the folder of a model", "full/pruned": "overlap", "full": "would replace a file"}
    for other, said in refused.items():
        found = run(*call, tmp_path / other, "--force")
        assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full", "papers", "pruned"]


@needs_transformers
def test_inspect_describes_a_folder(folder, run_json, printed):
    found = run_json("inspect", folder("glm4_moe"))
    layer = found["layers"]["model.layers.1.mlp"]
    assert (layer["experts"], layer["settings"]) == (EXPERTS, {"gates": "sigmoid", "top_k": 2, "groups": 1})
    tensors = tensors_of(folder("glm4_moe"))
    assert found["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["bytes_by_part"]["experts"] == sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts.0." in name)
    assert found["flops_per_input"]["experts"] == 64 * 2 * 2 * experts  # of 64 tokens that take two each
    shown = printed("inspect", folder("glm4_moe"))
    for part in ("glm4_moe, 2 blocks", "64 tokens (at most 64) of a vocabulary of 64", "63.7 % of the bytes"):
        assert part in shown


@pytest.mark.slow
def test_little_is_in_memory_however_large_the_folder_is(tmp_path):
    """A sparse file of 400 MB; the peak is that of a process of its own, above its imports."""
    h, names = 1 << 22, [f"model.layers.0.mlp.experts.{j}.down_proj.weight" for j in range(24)]
    shapes = dict.fromkeys(names, (1, h)) | {"model.layers.0.mlp.gate.weight": (24, 1)}
    source, end, header = tmp_path / "full", 0, {}
    source.mkdir()
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (source / "config.json").write_text(json.dumps({"model_type": "made_by_hand", "num_experts": 24}))
    made_by_hand(tmp_path / "small", layer_of("model.layers.0.mlp"), num_experts=4)
    code = """
import sys
from pathlib import Path
from moeprune.models.request import ModelSpec
from moeprune.pruning.checkpoint import prune_checkpoint
from moeprune.pruning.request import PruneRequest
def peak(): return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
for name in ("small", "full"):
    before, path = peak(), Path(sys.argv[1])
    how = {"keep": "1/2", "signal": "random", "compensate": "renorm"}
    prune_checkpoint(PruneRequest(checkpoint=ModelSpec(path=path / name), output=path / f"{name} pruned", **how))
print(peak() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    more = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True)
    assert (tmp_path / "full pruned" / "model.safetensors").stat().st_size > 200e6
    assert int(more) * 1024 < 64e6


def test_a_folder_without_safetensors_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(MoepruneError, match="save_pretrained"):
        read_folder(tmp_path)
    with pytest.raises(moeprune.MoepruneError):
        moeprune.load(tmp_path)
