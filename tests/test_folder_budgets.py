"""Folders of transformers pruned to a budget: what is tried, what it takes, and what is written."""

import itertools
import math
import re

import pytest
import torch

import moeprune
from moeprune.models.folders.costs import PrunedBytes
from moeprune.models.folders.layout import COUNTS, read_folder
from moeprune.plan import LayerPlan
from moeprune.pruning import auto
from moeprune.pruning.auto import split
from tests.architectures import CASES, language_model, load, tensors_of
from tests.language import V
from tests.test_narrow_folders import REFUSED, SHARED, WIDTHS

pytest.importorskip("transformers")
DATA = ("--sequence-length", 16, "--device", "cpu")
SIZES = [(4, None), (8, 8), (4, 8), (8, None)]


def settings_of(name: str, k: int, width: int | None, full: int) -> dict[str, int]:
    """The settings of an architecture with so many experts of a width, and shared ones as they were."""
    key = next(key for key in CASES[name] if key in COUNTS)
    changes = {key: k}
    if width is not None:
        changes[WIDTHS[name]] = width
        changes |= {SHARED[name]: full // width} if name in SHARED else {}
    return changes


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("name", sorted(set(CASES) - {"llama4_text", "hunyuan_v1_moe"}))
def test_bytes_of_a_pruned_folder_are_those_of_what_transformers_builds(name, speaking):
    widths = {} if "moe_intermediate_size" in CASES[name] else {"intermediate_size": 16}
    folder = speaking(name, torch.bfloat16, **widths)
    bytes_of = PrunedBytes(read_folder(folder), moeprune.load(folder).config.moe_layers)
    for k, width in SIZES:
        groups = {"topk_group": 1, "n_group": 1} if k < 8 and CASES[name].get("n_group", 1) > 1 else {}
        model = language_model(name, vocab_size=V, **{**widths, **settings_of(name, k, width, 16), **groups})
        assert bytes_of.of(k, width) == sum(tensor.nbytes for tensor in model.bfloat16().state_dict().values())


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize(("name", "budget"), [("qwen3_moe", "60%"), ("deepseek_v3", "0.8"), ("gpt_oss", "60%")])
def test_a_budget_of_bytes_is_met_by_fewer_or_narrower_experts(name, budget, speaking, text, run_json, tmp_path):
    folder = speaking(name, torch.bfloat16, **{WIDTHS[name]: 32})
    report = run_json("prune", folder, "--data", text, *DATA, "--max-size", budget, "-o", tmp_path / "pruned")
    written, full = read_folder(tmp_path / "pruned").cost(), read_folder(folder).cost()
    assert report["model"]["bytes"] == written.bytes == sum(t.nbytes for t in tensors_of(tmp_path / "pruned").values())
    candidates = report["candidates"]
    share = float(budget.rstrip("%")) / (100 if "%" in budget else 1)
    assert all(0.75 * share < each["size"] <= share for each in candidates)
    [chosen] = [each for each in candidates if each["is_chosen"]]
    assert chosen["size"] == written.bytes / full.bytes
    assert chosen["flops"] == written.flops_per_input.total / full.flops_per_input.total
    assert (tmp_path / "pruned" / "moeprune.json").is_file()
    load(tmp_path / "pruned")
    assert {each["width"] is None for each in candidates} == {True, False}
    assert all(len({*each["k"].values()}) == 1 for each in candidates)


@pytest.mark.parametrize("name", REFUSED)
def test_experts_that_cannot_be_narrower_are_dropped_alone(name, speaking, text, run_json, tmp_path):
    folder = speaking(name)
    report = run_json("prune", folder, "--data", text, *DATA, "--max-size", "80%", "-o", tmp_path / "pruned")
    assert (report["candidates"], {plan["width"] for plan in report["plan"].values()}) == ([], {None})
    assert 0.6 < report["model"]["bytes"] / report["full_model"]["bytes"] <= 0.8


def test_a_budget_of_flops_narrows_all_experts(speaking, text, run_json, run, tmp_path):
    folder = speaking("qwen3_moe", moe_intermediate_size=64)
    call = ("prune", folder, "--data", text, *DATA, "--max-flops")
    report = run_json(*call, "90%", "-o", tmp_path / "pruned")
    written, full = read_folder(tmp_path / "pruned").cost(), read_folder(folder).cost()
    assert report["model"]["flops_per_input"]["total"] == written.flops_per_input.total
    assert 0.85 < written.flops_per_input.total / full.flops_per_input.total <= 0.9
    assert {*itertools.chain(*(each["k"].values() for each in report["candidates"]))} == {8}
    found = run("prune", speaking("llama4_text"), "--data", text, *DATA, "--max-flops", "60%", "-o", tmp_path / "no")
    assert (found.code, "`--max-flops 60%` is less than any plan takes" in found.stderr) == (2, True)


def test_widths_are_multiples_of_eight_and_experts_fill_what_is_left(speaking, text, run_json, tmp_path):
    folder = speaking("mixtral", intermediate_size=40)
    bytes_of = PrunedBytes(read_folder(folder), moeprune.load(folder).config.moe_layers)
    report = run_json("prune", folder, "--data", text, *DATA, "--max-size", "70%", "-o", tmp_path / "pruned")
    sizes = set()
    for each in report["candidates"]:
        [k], width = {*each["k"].values()}, each["width"] and next(iter(each["width"].values()))
        sizes.add((k, width))
        assert width is None or width % 8 == 0
        assert k == 8 or bytes_of.of(k + 1, width) > 0.7 * bytes_of.full >= bytes_of.of(k, width)
    assert len(sizes) >= 3


def test_a_budget_that_nothing_meets_is_refused_with_one_that_something_does(speaking, text, run, run_json, tmp_path):
    folder = speaking("qwen3_moe")
    call = ("prune", folder, "--data", text, *DATA, "--max-size")
    for budget in ("5%", "10kB"):
        found = run(*call, budget, "-o", tmp_path / "small")
        assert (found.code, f"`--max-size {budget}` is less than any plan" in found.stderr) == (2, True), found.stderr
        assert [*tmp_path.iterdir()] == []
        [least] = re.findall("give at least (.+)", found.stderr)
    report = run_json(*call, least, "-o", tmp_path / "small")
    assert report["model"]["bytes"] == math.ceil(float(least.rstrip("B")))
    whole = run_json(*call, "100%", "-o", tmp_path / "whole")
    assert whole["model"] == whole["full_model"]


def test_candidates_are_compared_as_they_would_predict(speaking, text, run_json, tmp_path, monkeypatch):
    folder = speaking("qwen3_moe")
    call = ("prune", folder, "--data", text, *DATA, "--max-size", "80%", "-o")
    report = run_json(*call, tmp_path / "pruned")
    full = moeprune.load(folder)
    fitted_on, held_out = split(moeprune.open_data(str(text), full.input_format, sequence_length=16))
    [ids] = [inputs for inputs, _ in held_out.batches(1000)]
    for each in report["candidates"]:
        assert (each["samples"], each["layers"]) == (len(ids), 2)
        size = {"keep": next(iter(each["k"].values())), "compensate": each["compensate"]}
        size |= {"width": str(next(iter(each["width"].values())))} if each["width"] else {}
        pruned = moeprune.prune(full, data=fitted_on, device="cpu", **size)
        change = (pruned(ids).softmax(-1) - full(ids).softmax(-1)).abs().sum(-1).mean() / 2
        assert each["distance"] == pytest.approx(float(change), rel=0.3)  # here later layers are fitted behind others
    monkeypatch.setattr(auto, "MOST_LAYERS", 1)
    some = run_json(*call, tmp_path / "by one")["candidates"]
    assert {each["layers"] for each in some} == {1}
    assert max(each["distance"] for each in some) < max(each["distance"] for each in report["candidates"])
    assert [each["size"] for each in some] == [each["size"] for each in report["candidates"]]


def test_comparing_takes_about_as_much_text_as_pruning(speaking):
    model = moeprune.load(speaking("qwen3_moe"))
    data = moeprune.open_data(torch.zeros(20_000, 16, dtype=torch.int64), model.input_format)
    few, many = (dict.fromkeys(map(str, range(n)), LayerPlan("static", 4, 8, "gram", "renorm")) for n in (2, 48))
    assert auto._trial(model, [few] * 5, data) == (4000, ["0", "1"])
    assert auto._trial(model, [many] * 12, data)[0] == 8192  # MOST_TOKENS
    inputs, names = auto._trial(model, [many] * 6, data.sample(2000))
    assert (inputs, len(names), names[0], names[-1]) == (2000, 8, "0", "47")


def test_python_and_an_analysis_give_the_same_folder(speaking, text, run_json, tmp_path):
    folder = speaking("qwen3_moe")
    report = run_json("prune", folder, "--data", text, *DATA, "--max-size", "60%", "-o", tmp_path / "pruned")
    data = moeprune.open_data(str(text), moeprune.load(folder).input_format, sequence_length=16)
    moeprune.save(moeprune.prune(folder, data, max_size="60%", device="cpu"), tmp_path / "python")
    run_json("analyze", folder, "--data", text, *DATA, "-o", tmp_path / "analysis.safetensors")
    how = ("--analysis", tmp_path / "analysis.safetensors", "--max-size", "60%", "--device", "cpu")
    again = run_json("prune", folder, *how, "-o", tmp_path / "again")
    assert again["candidates"] == report["candidates"]
    for other in ("python", "again"):
        assert all(map(torch.equal, tensors_of(tmp_path / other).values(), tensors_of(tmp_path / "pruned").values()))


def test_little_text_is_warned_of_where_something_is_fitted(speaking, text, run, run_json, tmp_path):
    folder = speaking("qwen3_moe")
    call = ("prune", folder, "--data", text, *DATA, "--keep", "1/2")
    report = run_json(*call, "-o", tmp_path / "pruned", "--repeat", "2")
    assert report["candidates"] == []
    assert len(report["repeats"]["distance"]) == 2
    assert [message for message in report["warnings"] if "416 tokens of calibration data are few" in message]
    found = run(*call, "--compensate", "renorm", "-o", tmp_path / "plain")
    assert (found.code, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-size", "0.5", "--compensate", "affine"), "`--max-size` does not go with `--compensate affine`"),
        (("--max-accuracy-drop", "0.1"), "searches on labels, which text does not have"),
        (("--keep", "4", "--energy", "0.9"), "`--energy` goes with nothing that `auto` tries"),
        (("--mass", "0.9", "--scope", "input"), "`--mass` does not go with a folder"),
        (("--max-size", "0.5", "--scope", "input"), "with scope static only"),
    ],
)
def test_what_a_folder_cannot_be_asked_for_is_refused(options, said, speaking, text, run, tmp_path):
    found = run("prune", speaking("qwen3_moe"), "--data", text, *DATA, *options, "-o", tmp_path / "pruned")
    assert (found.code, said in found.stderr) == (2, True), found.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("options", [("--max-size", "0.5"), ("--max-flops", "0.5"), ("--keep", "4", "--repeat", "2")])
def test_budgets_and_repeats_need_data(options, speaking, run, tmp_path):
    found = run("prune", speaking("qwen3_moe"), *options, "--signal", "random", "-o", tmp_path / "pruned")
    assert (found.code, f"`{options[-2]}` needs calibration data" in found.stderr) == (2, True), found.stderr
