"""Folders of transformers opened as models: analyzed, pruned with refits, saved and evaluated."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moeprune
from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import tensor_infos
from moeprune.models import building
from moeprune.models.folders.layout import read_folder
from tests.architectures import CASES, language_model, load, model_with_images, saved_models, tensors_of
from tests.language import V, make_tokenizer, write_lines

pytest.importorskip("transformers")
BLIND = ("--signal", "random", "--compensate", "renorm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small model of an architecture."""
    return saved_models(tmp_path_factory)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """Return the folder of a small model with a tokenizer, and a file of text."""
    made: dict[str, tuple[Path, Path]] = {}

    def speaking(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "full"
            widths = {"intermediate_size": 32} if name == "gpt_oss" else {}  # those of the original are equal too
            language_model(name, vocab_size=V, **widths).save_pretrained(folder, max_shard_size="40KB")
            texts = [f"text number {n} of some {'more ' * (n % 5)}words" for n in range(120)]
            make_tokenizer(folder, texts)
            made[name] = folder, write_lines(folder.parent / "text.jsonl", [{"text": text} for text in texts])
        return made[name]

    return speaking


@pytest.mark.parametrize("name", CASES)
def test_our_model_of_a_folder_computes_what_transformers_does(name, folder):
    ours, theirs = moeprune.load(folder(name)).double(), load(folder(name))
    tokens = torch.arange(3, 27).view(2, 12)
    expected = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(ours(tokens), expected, atol=1e-6, rtol=0)
    assert set(ours.moe_layers) == set(read_folder(folder(name)).layers)
    assert sum(t.numel() for t in ours.state_dict().values()) == sum(
        t.numel() for t in tensors_of(folder(name)).values()
    )


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("name", sorted(set(CASES) - {"llama4_text"}))
def test_flops_are_those_that_torch_counts(name, folder):
    """Their block of Llama 4 runs all experts on zeros."""
    theirs, ours = load(folder(name)), moeprune.load(folder(name))
    theirs.set_attn_implementation("eager")  # the kernels' formulas are wrong where heads share keys
    tokens = torch.zeros(1, ours.config.tokens(""), dtype=torch.int64)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        theirs(tokens, use_cache=False)
    assert ours.cost().flops_per_input.total == counted.get_total_flops()
    assert ours.config.cost({}, tensor_infos(ours.state_dict())) == ours.cost()


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "qwen2_moe"])
def test_a_refitted_folder_holds_what_was_pruned_in_memory(name, speaking, run_json, tmp_path):
    """Layouts: a tensor for each expert, stacked ones, transposed and with biases; groups; shared experts."""
    folder, text = speaking(name)
    call = ("prune", folder, "--data", text, "--sequence-length", 16, "--keep", "1/2", "--signal", "combine")
    report = run_json(*call, "-o", tmp_path / "refitted")
    assert {plan["compensation"] for plan in report["plan"].values()} == {"renorm-refit"}
    data = moeprune.open_data(str(text), moeprune.load(folder).input_format, sequence_length=16)
    pruned = moeprune.prune(moeprune.load(folder), data=data, keep="1/2", signal="combine", compensate="renorm-refit")
    tokens = torch.arange(3, 27).view(2, 12)
    written = load(tmp_path / "refitted")(tokens, use_cache=False).logits
    moeprune.save(pruned, tmp_path / "saved")
    assert all(map(torch.equal, tensors_of(tmp_path / "saved").values(), tensors_of(tmp_path / "refitted").values()))
    torch.testing.assert_close(written, pruned.double()(tokens), atol=1e-5, rtol=0)
    assert report["model"]["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "refitted").values())


def test_analyze_prune_and_eval_work_end_to_end(speaking, run_json, run, tmp_path):
    folder, text = speaking("qwen3_moe")
    data = ("--data", text, "--sequence-length", 16)
    half, names = language_model("qwen3_moe", vocab_size=V).bfloat16(), ("tokenizer.json", "tokenizer_config.json")
    half.save_pretrained(tmp_path / "full")
    for name in names:
        shutil.copy(folder / name, tmp_path / "full")
    full = tmp_path / "full"
    analysis = run_json("analyze", full, *data, "-o", tmp_path / "analysis.safetensors")
    assert set(analysis["layers"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    losses = {}
    for name, how in (("refit", data), ("slice", BLIND)):
        report = run_json("prune", full, "--keep", "1/2", *how, "-o", tmp_path / name)
        assert {tensor.dtype for tensor in tensors_of(tmp_path / name).values()} == {torch.bfloat16}
        assert report["full_model"]["bytes"] == sum(tensor.nbytes for tensor in tensors_of(full).values())
        found = run("eval", tmp_path / name, *data, "--baseline", full, "--output-format", "json")
        assert found.code == 0, found.stderr
        assert ("calibrated on the very samples" in found.stderr) == (name == "refit")
        assert "was not pruned from the baseline" not in found.stderr
        losses[name] = json.loads(found.stdout)
        share = report["model"]["bytes"] / report["full_model"]["bytes"]
        assert losses[name]["difference"]["size_reduction"] == pytest.approx(1 - share)
    assert losses["refit"]["difference"]["kl"] < losses["slice"]["difference"]["kl"]
    again = run(
        "prune", full, "--keep", "1/2", "--analysis", tmp_path / "analysis.safetensors", "-o", tmp_path / "again"
    )
    assert again.code == 0, again.stderr
    assert all(map(torch.equal, tensors_of(tmp_path / "again").values(), tensors_of(tmp_path / "refit").values()))
    for name, said in (("olmoe", "was not pruned from the baseline"), ("mixtral", "no MoE layer `model.layers.0.mlp`")):
        found = run("eval", tmp_path / "refit", *data, "--baseline", speaking(name)[0])
        assert (found.code, said in found.stderr) == (0 if name == "olmoe" else 2, True), found.stderr
    card = (tmp_path / "refit" / "README.md").read_text()
    assert "chosen by signal `gram`" in card
    assert "`text.jsonl`" in card


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--compensate", "refit", "--keep", "1/2"), "give `--compensate renorm-refit`"),
        (("--compensate", "merge", "--keep", "1/2"), "is not what a folder can hold"),
        (("--keep", "1"), "runs 2 experts for each token"),
        (("--keep", "1/2", "--preprocess", "mean=0.5"), "`--preprocess` is of images"),
        (("--keep", "1/2", "--save-plan", "pruned"), "`--save-plan` and another output are both"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_before_any_pass(options, said, speaking, run, tmp_path):
    folder, text = speaking("qwen3_moe")
    options = [tmp_path / "pruned" if option == "pruned" else option for option in options]
    found = run("prune", folder, "--data", text, "--sequence-length", 16, *options, "-o", tmp_path / "pruned")
    assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert [*tmp_path.iterdir()] == []


def test_without_transformers_folders_are_sliced_but_not_opened(folder, run, tmp_path, monkeypatch):
    source = folder("mixtral")
    monkeypatch.setitem(sys.modules, "transformers", None)
    building.library.cache_clear()
    assert run("prune", source, "--keep", "1/2", *BLIND, "-o", tmp_path / "pruned").code == 0
    with pytest.raises(MoepruneError, match="needs the package transformers"):
        moeprune.load(source)


def test_a_folder_is_not_exported(folder, run, tmp_path):
    found = run("export", folder("mixtral"), "--to", "soft-moe", "-o", tmp_path / "out.safetensors")
    assert (found.code, "is a folder of transformers already" in found.stderr) == (2, True), found.stderr


def test_the_language_part_of_a_model_that_takes_images_is_pruned_and_opened(run_json, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = model_with_images()
    model.save_pretrained(tmp_path / "full")
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(moeprune.load(tmp_path / "full")(tokens), expected, atol=1e-5, rtol=0)
    report = run_json("prune", tmp_path / "full", "--keep", "1/2", *BLIND, "-o", tmp_path / "pruned")
    assert [*report["plan"]] == ["model.language_model.layers.0.mlp", "model.language_model.layers.1.mlp"]
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info.values()), info
