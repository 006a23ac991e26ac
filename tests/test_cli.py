"""The commands on the shipped checkpoints: reports, files, gates, exit codes, repeatability."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from typer.testing import CliRunner

import moeprune
from moeprune.cli import app
from moeprune.cli.reporter import Format
from moeprune.evaluation.evaluate import Predictions, compare
from moeprune.evaluation.gates import judge
from moeprune.models.architecture import architecture_from_json
from moeprune.plan import LOW_RANK, LayerPlan
from moeprune.pruning.auto import TRIED_STATIC
from moeprune.pruning.sweep import METHODS
from moeprune.records import to_text
from tests.damage import metadata_of, parts_of, with_header, with_metadata
from tests.endings import PATIENCE, on_a_terminal, refusal, time_limit
from tests.results import cost, evaluation
from tests.schemas import complaints
from tests.stock import PAPER, SOURCE_ARGS, STATIC
from tests.test_readme import GUIDE, block, without_numbers

SCOPES = ("static", "input", "batch")
COMPENSATIONS = ("none", "renorm", "mean", "lstsq", "affine")
EXPERT_TENSORS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
LAYER = "blocks.0.soft_moe"
COMMANDS = ("inspect", "analyze", "prune", "eval", "export", "demo", "schema")


def header(path: Path) -> dict:
    """The tensors of a safetensors file by name, read without the library."""
    found, _ = parts_of(path.read_bytes())
    del found["__metadata__"]
    return found


def tensor_bytes(path: Path, *suffixes: str) -> int:
    """Bytes of the tensors of a safetensors file, or of those with one of these last names."""
    spans = [t["data_offsets"] for name, t in header(path).items() if not suffixes or name.endswith(suffixes)]
    return sum(end - start for start, end in spans)


def details(path: Path) -> dict:
    """The JSON of the metadata key `moeprune`."""
    return metadata_of(path.read_bytes())


def soft_moe(path: Path) -> dict[str, dict]:
    """The Soft MoE layers in a checkpoint's architecture."""
    blocks = details(path)["architecture"]["blocks"]
    return {f"blocks.{i}.soft_moe": block["soft_moe"] for i, block in enumerate(blocks) if "soft_moe" in block}


def keys_of(rows: list[dict]) -> list[tuple]:
    """What tells the rows of a sweep apart."""
    return [tuple(row[key] for key in ("keep", "scope", "signal", "compensate")) for row in rows]


@pytest.fixture(scope="module")
def pruned(single, single_analysis, made):
    """`single` pruned to 1/8 without compensation: a file with a clear loss of accuracy."""
    return made(f"prune {single} --analysis {single_analysis} --keep 1/8 {STATIC}")


@pytest.fixture
def prune(single, small_analysis, run_json, tmp_path):
    """Prune with options given as text; the file, and the report."""

    def prune(options: str, checkpoint=single, analysis=small_analysis):
        path = tmp_path / f"pruned{len(list(tmp_path.iterdir()))}.safetensors"
        words = () if analysis is None else ("--analysis", analysis)
        return path, run_json("prune", checkpoint, *words, *options.split(), "-o", path)

    return prune


@pytest.fixture(scope="module")
def evaluated(pruned, single, run_json):
    return run_json("eval", pruned, "--data", "digits", "--baseline", single, "--batch-size", 256)


# --- inspect
def test_inspect_json_says_what_is_in_the_file(single, run_json):
    found = run_json("inspect", single)
    assert found["schema_version"] == 1
    assert found["checkpoint"] == str(single)
    assert found["bytes"] == tensor_bytes(single)
    assert found["parameters"] == tensor_bytes(single) // 4
    assert found["experts_per_input"] == 128
    shapes = [t["shape"] for name, t in header(single).items() if name.startswith(f"{LAYER}.")]
    assert found["layers"][LAYER] == {
        "family": "soft_moe", "experts": 128, "settings": {"dim": 32, "slots_per_expert": 1, "hidden_dim": 4},
        "parameters": sum(math.prod(shape) for shape in shapes), "plan": None,
    }  # fmt: skip
    for key in ("architecture", "preprocessing", "provenance"):
        assert found[key] == details(single)[key]


def test_inspect_text_names_the_layers_and_their_sizes(vit, printed):
    shown = printed(f"inspect {vit}")
    rows = [line.split() for line in shown.splitlines() if line.startswith("blocks.")]
    expected = [[name, str(layer["num_experts"])] for name, layer in soft_moe(vit).items()]
    assert [row[:2] for row in rows] == expected
    assert len(rows) > 1
    assert all(row[-1] == "dense" for row in rows)
    for text in ("slots_per_expert 2, hidden_dim 16", "1 × 8 × 16", "100 classes"):
        assert text in shown


def test_inspect_shows_the_plan_of_a_pruned_checkpoint(pruned, evaluated, run, run_json):
    found = run_json("inspect", pruned)
    sizes = ("parameters", "bytes", "bytes_by_part", "flops_per_input", "experts_per_input")
    assert [found[key] for key in sizes] == [evaluated["model"][key] for key in sizes]
    plan = found["layers"][LAYER]["plan"]
    assert plan == details(pruned)["plan"][LAYER]
    shown = ", ".join(str(expert) for expert in plan["kept"])
    printed = run("inspect", pruned).stdout
    assert "static, 16 of 128 by combine, none" in printed
    assert f"kept in blocks.0.soft_moe  {shown}" in printed


# --- analyze
def test_analyze_json_summarizes_each_layer(vit, run_json, tmp_path):
    path = tmp_path / "analysis.safetensors"
    found = run_json("analyze", vit, "--data", "pairs", "--limit", 30, "-o", path)
    assert found["analysis"] == str(path)
    assert (found["data"]["spec"], found["data"]["samples"]) == ("pairs:calibration", 30)
    assert list(found["layers"]) == list(soft_moe(vit))
    for layer in found["layers"].values():
        assert layer["experts"] == 64
        assert layer["uniform_mass"] == 1 / 8
        assert 1 / 8 < layer["best_eighth_mass"] < 1
        few, many, most = layer["experts_for_mass_per_input"]
        assert 1 <= few < many < most <= 64
        assert layer["informative"] is (layer["best_eighth_mass"] >= 0.45)
    written = details(path)
    assert (written["kind"], written["format"]) == ("analysis", 2)
    assert list(written["layers"]) == list(found["layers"])
    assert written["origin"]["data"] == found["data"]


def test_analyze_text_gives_a_verdict_for_each_layer(single, printed, tmp_path):
    shown = printed(f"analyze {single} --data digits --limit 40 -o {tmp_path}/a.safetensors")
    assert f"{single} on digits:calibration (40 samples)" in shown
    assert "blocks.0.soft_moe: the combine signal is informative" in shown
    assert "40 samples cannot tell how pruning changes the predictions" in shown


@pytest.mark.slow
def test_analyze_says_what_its_probes_measured(vit, run, run_json, tmp_path):
    """Predictions without experts and with the paper's rule, of all layers and of each; never a cost from the mass."""
    words = ("analyze", vit, "--data", "pairs", "--limit", 100, "-o", tmp_path / "a.safetensors", "--force")
    found, model = run_json(*words), moeprune.load(vit)
    data = moeprune.open_data("pairs:calibration", model.input_format, limit=100)

    def agreement(k, *names):
        plan = {name: LayerPlan("input", k, 64, "combine", "none") for name in names}
        return moeprune.evaluate(moeprune.prune(model, plan=plan), data, model).difference.agreement

    name = "blocks.1.soft_moe"
    for probes, names in ((found["probes"], list(model.moe_layers)), (found["layers"][name]["probes"], [name])):
        assert probes["samples"] == 100
        assert probes["no_experts"]["agreement"] == pytest.approx(agreement(0, *names))
        assert probes["best_eighth"]["agreement"] == pytest.approx(agreement(8, *names))
    lines = run(*words).stdout.splitlines()
    [mass] = [line for line in lines if line.startswith("all layers: the combine signal")]
    assert max(map(len, lines[1 : lines.index(mass)])) <= 80
    assert sum("of the predictions" in line for line in lines) < 4


# --- prune
@pytest.mark.mostly_slow(3)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("compensate", COMPENSATIONS)
def test_a_pruned_file_evaluates_as_the_pruned_model_in_memory(
    single, small_analysis, prune, run_json, scope, compensate
):
    path, made = prune(f"--keep 1/8 --scope {scope} --compensate {compensate}")
    plan = made["plan"][LAYER]
    assert (plan["scope"], plan["compensation"], plan["k"]) == (scope, compensate, 16)
    assert (plan["kept"] is not None) == (scope == "static")
    assert made["checkpoint"] == str(path)
    assert made["model"]["bytes"] == tensor_bytes(path)
    assert made["full_model"]["bytes"] == tensor_bytes(single)
    assert made["model"]["experts_per_input"] == 16
    share = 8 if scope == "static" else 1
    assert tensor_bytes(path, *EXPERT_TENSORS) * share == tensor_bytes(single, *EXPERT_TENSORS)
    found = run_json("eval", path, "--data", "digits", "--baseline", single, "--limit", 150)

    model, analysis = moeprune.load(single), moeprune.load_analysis(small_analysis)
    pruned = moeprune.prune(model, analysis, keep="1/8", scope=scope, compensate=compensate)
    data = moeprune.open_data("digits", model.input_format, limit=150)
    in_memory = moeprune.evaluate(pruned, data, baseline=model)
    assert found["model"] == json.loads(to_text(in_memory.model))
    assert found["difference"] == json.loads(to_text(in_memory.difference))


@pytest.mark.slow
def test_layers_of_a_deep_model_are_pruned_one_after_the_other(vit, vit_analysis, prune, run_json):
    """Each behind the pruned ones before it: the same as in memory, and all of them smaller."""
    path, made = prune("--keep 1/8 --compensate mean", vit, vit_analysis)
    assert list(made["plan"]) == list(soft_moe(vit))
    assert tensor_bytes(path, *EXPERT_TENSORS) * 8 == tensor_bytes(vit, *EXPERT_TENSORS)
    found = run_json("eval", path, "--data", "pairs", "--limit", 60)
    model, analysis = moeprune.load(vit), moeprune.load_analysis(vit_analysis)
    data = moeprune.open_data("pairs", model.input_format, "calibration", limit=100)
    pruned = moeprune.prune(model, analysis, keep="1/8", compensate="mean", data=data)
    test = moeprune.open_data("pairs", model.input_format, limit=60)
    assert found["model"] == json.loads(to_text(moeprune.evaluate(pruned, test).model))
    *_, (name, last) = pruned.moe_layers.items()
    of_unpruned = analysis.layers[name].term_mean[list(last.plan.dropped)]
    assert not torch.allclose(last.surrogate[last.plan.k :], of_unpruned, rtol=1e-3)


def test_routed_scopes_need_no_calibration_without_compensation(single, prune):
    path, made = prune(f"--keep 16 {PAPER} --preprocess mean=0.5", analysis=None)
    assert tensor_bytes(path) == tensor_bytes(single)
    assert made["model"]["flops_per_input"]["experts"] * 8 == made["full_model"]["flops_per_input"]["experts"]
    assert "calibration" not in details(path)["provenance"]
    assert details(path)["preprocessing"] == {**details(single)["preprocessing"], "mean": [0.5]}


def test_prune_text_gives_sizes_and_kept_experts(single, small_analysis, run, tmp_path):
    path = tmp_path / "pruned.safetensors"
    shown, listed = (
        run(f"prune {single} --analysis {small_analysis} --keep 1/64 {STATIC} -o {path} --force {more}").stdout
        for more in ("", "--verbose")
    )
    first, second = details(path)["plan"][LAYER]["kept"]
    assert "1/64 of the experts in each layer" in shown
    assert "static, 2 of 128 by combine, none\n" in shown
    assert f"static, 2 of 128 by combine, none: {first}, {second}\n" in listed
    assert f"({100 * tensor_bytes(path) / tensor_bytes(single):.1f} %)" in shown
    assert str(path) in shown


def test_metadata_is_one_key_of_sorted_json_that_names_what_it_was_made_from(single, pruned, single_analysis):
    [(key, text)] = parts_of(pruned.read_bytes())[0]["__metadata__"].items()
    found = json.loads(text)
    assert (key, text) == ("moeprune", json.dumps(found, sort_keys=True, separators=(",", ":")))
    assert set(found) == {"format", "kind", "architecture", "preprocessing", "source", "plan", "provenance"}
    assert found["architecture"] == details(single)["architecture"]
    origin = details(single_analysis)["origin"]
    assert found["provenance"]["pruned_from"]["fingerprint"] == origin["checkpoint"]
    assert found["provenance"]["calibration"] == origin["data"]


# --- eval
def test_eval_json_names_its_files_and_parts_sum_to_the_total(evaluated, pruned, single):
    assert (evaluated["checkpoint"], evaluated["baseline"]) == (str(pruned), str(single))
    for model in ("model", "baseline_model"):
        flops = evaluated[model]["flops_per_input"]
        assert flops["total"] == sum(part for name, part in flops.items() if name != "total")
    assert (evaluated["gates"], evaluated["passed"]) == ([], True)


def test_eval_figures_equal_a_plain_loop(evaluated, single, pruned):
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    place = dict.fromkeys(range(10), 0)
    test = []
    for index, digit in enumerate(bunch.target):
        if place[digit] % 10 >= 7:
            test.append(index)
        place[digit] += 1
    inputs = (torch.tensor(bunch.images[test])[:, None].float() / 16 - 0.3) / 0.375
    labels = torch.tensor(bunch.target[test])
    predicted = {}
    for key, path in (("model", pruned), ("baseline_model", single)):
        logits = moeprune.load(path)(inputs)
        predicted[key] = logits.argmax(1)
        top5 = (logits.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
        figures = evaluated[key]
        assert figures["accuracy"] == (predicted[key] == labels).sum().item() / len(labels)
        assert figures["top5_accuracy"] == top5.sum().item() / len(labels)
        assert figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert figures["bytes"] == tensor_bytes(path)
    same = (predicted["model"] == predicted["baseline_model"]).double().mean()
    difference = evaluated["difference"]
    assert evaluated["data"]["samples"] == len(labels) == 531
    assert difference["agreement"] == pytest.approx(same.item())
    drop = evaluated["baseline_model"]["accuracy"] - evaluated["model"]["accuracy"]
    assert difference["accuracy_drop"] == pytest.approx(drop)
    assert drop > 0.05
    assert difference["size_reduction"] == pytest.approx(1 - tensor_bytes(pruned) / tensor_bytes(single))


def test_eval_text_shows_the_figures_of_the_json(evaluated, pruned, single, printed):
    shown = printed(f"eval {pruned} --data digits --baseline {single} --batch-size 256")
    for key in ("model", "baseline_model"):
        assert f"{100 * evaluated[key]['accuracy']:.2f} %" in shown
        assert f"{evaluated[key]['loss']:.4f}" in shown
    assert f"accuracy drop {100 * evaluated['difference']['accuracy_drop']:+.2f} pt" in shown


@pytest.mark.parametrize("passed", [True, False])
def test_gates_pass_at_their_limits_and_fail_beyond(evaluated, pruned, single, run, passed):
    of = evaluated["difference"]
    names = ("accuracy_drop", "flops_reduction", "size_reduction", "agreement")
    values = {f"{'max' if name == 'accuracy_drop' else 'min'}_{name}": of[name] for name in names}
    values["min_accuracy"] = evaluated["model"]["accuracy"]
    beyond = 0 if passed else 1e-9
    limits = {name: value - beyond if "max" in name else value + beyond for name, value in values.items()}
    gates = " ".join(f"--{name.replace('_', '-')} {limit!r}" for name, limit in limits.items())
    result = run(f"eval {pruned} --data digits {gates} --baseline {single} --batch-size 256 --output-format json")
    found = json.loads(result.stdout)
    for gate in found["gates"]:
        name, reason = gate["name"], None if passed else "missed"
        assert (gate["limit"], gate["value"], gate["passed"], gate["reason"]) == (
            limits.pop(name), values[name], passed, reason,
        )  # fmt: skip
    assert not limits
    assert (result.code, result.stderr, found["passed"]) == (0 if passed else 1, "", passed)


def test_one_failed_gate_of_two_fails_the_eval_and_text_says_which(single, run):
    gates = "--min-accuracy 0.5 --min-size-reduction 0.5"
    result = run(f"eval {single} --data digits --limit 50 --baseline {single} {gates}")
    assert result.code == 1
    rows = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if "min_" in line}
    assert rows == {"min_accuracy": "passed", "min_size_reduction": "FAILED"}


def test_a_failed_gate_still_writes_the_output_file(single, run, tmp_path):
    path = tmp_path / "result.json"
    result = run(f"eval {single} --data digits --min-accuracy 1 --output-file {path} --output-format json")
    assert (result.code, result.stdout) == (1, "")
    assert json.loads(path.read_text())["passed"] is False


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("scope", ["static", "input"])
@pytest.mark.parametrize("compensate", ["none", "renorm", "mean"])
def test_batch_size_does_not_matter(prune, run_json, scope, compensate):
    path, _ = prune(f"--keep 1/8 --scope {scope} --compensate {compensate}")
    first, *others = (run_json(f"eval {path} --data digits --limit 100 --batch-size {size}") for size in (1, 7, 100))
    for other in others:
        assert other["model"]["accuracy"] == first["model"]["accuracy"]
        assert other["data"] == first["data"]
        assert other["model"]["loss"] == pytest.approx(first["model"]["loss"], abs=1e-5)


def test_limit_takes_so_many_samples(single, run_json):
    found = run_json("eval", single, "--data", "digits:train", "--limit", 37)
    assert (found["data"]["spec"], found["data"]["samples"]) == ("digits:train", 37)
    everything = run_json("eval", single, "--data", "digits", "--limit", 10_000, "--batch-size", 256)
    assert everything["data"]["samples"] == 531


def test_bf16_is_about_as_accurate(single, run_json):
    full = run_json("eval", single, "--data", "digits", "--limit", 150)
    bf16 = run_json("eval", single, "--data", "digits", "--limit", 150, "--dtype", "bf16")
    assert bf16["environment"]["dtype"] == "bf16"
    assert bf16["model"]["loss"] != full["model"]["loss"]
    assert bf16["model"]["accuracy"] == pytest.approx(full["model"]["accuracy"], abs=0.03)


# --- eval --sweep
def test_a_refit_that_is_too_large_is_left_out_of_a_sweep(single, small_analysis, run, monkeypatch):
    monkeypatch.setattr("moeprune.pruning.compensation.MAX_REGRESSORS", 300)
    words = "--sweep 1/2,1/16 --scope static --signal combine --compensate refit --compensate mean --output-format json"
    found = run(f"eval {single} --data digits --limit 20 --analysis {small_analysis} {words}")
    assert found.code == 0
    assert "refits are left out at 1/2: they would take more than 300 regressors" in found.stderr
    rows = {(row["keep"], row["compensate"]) for row in json.loads(found.stdout)["rows"]}
    assert rows == {("1.0", None), ("0", "mean"), ("1/2", "mean"), ("1/16", "mean"), ("1/16", "refit")}


def test_a_sweep_compares_methods_and_controls(single, small_analysis, run_json):
    words = "--limit 40 --sweep 1/8 --analysis"
    rows = run_json("eval", single, "--data", "digits", *words.split(), small_analysis)["rows"]
    [auto] = [row for row in rows if row["label"] == "auto"]
    methods = [("1/8", *method) for method in METHODS if "auto" not in method]
    controls = [("0", "static", "combine", compensate) for compensate in ("none", "affine", "linear")]
    chosen = ("1/8", auto["scope"], auto["signal"], auto["compensate"])
    assert keys_of(rows) == [("1.0", None, None, None), chosen, *methods, *controls]
    assert auto["compensate"] in TRIED_STATIC
    assert [row["rank"] for row in rows if row is not auto] == [None] * (len(rows) - 1)
    assert (auto["rank"] is not None) == (auto["compensate"] in LOW_RANK)
    of = dict(zip(keys_of(rows), rows, strict=True))
    assert of["0", "static", "combine", "linear"]["label"] == "no MoE at all: linear"
    assert of["0", "static", "combine", "linear"]["model"]["flops_per_input"]["routing"] == 0


@pytest.mark.slow
def test_sweep_evaluates_every_way_beside_its_controls(single, small_analysis, run_json):
    scopes = [word for scope in SCOPES for word in ("--scope", scope)]
    words = ("--data", "digits", "--limit", 40, "--sweep", "1/8", "--analysis", small_analysis, *scopes)
    found = run_json("eval", single, *words)
    rows = found["rows"]
    keys = keys_of(rows)
    every_way = [
        *product(["1/8"], SCOPES, ["combine", "deviation"], COMPENSATIONS),
        *product(["1/8"], ["static"], ["gram"], COMPENSATIONS),
        *product(["1/8"], ["static"], ["combine", "deviation", "gram", "random"], ["refit", "renorm-refit"]),
        *product(["1/8"], SCOPES, ["combine", "deviation"], LOW_RANK),
        *product(["1/8"], ["static"], ["gram", "random"], LOW_RANK),
    ]
    random = [("1/8", "static", "random", compensate) for compensate in COMPENSATIONS]
    no_experts = [("0", "static", "combine", c) for c in (*COMPENSATIONS, *LOW_RANK) if c != "renorm"]
    assert keys[0] == ("1.0", None, None, None)
    assert len(keys) == len(set(keys))
    assert set(keys[1:]) == {*every_way, *random, *no_experts}
    assert (rows[0]["retained"], rows[0]["agreement"], rows[0]["difference"]["size_reduction"]) == (1, 1, 0)
    for row, (keep, scope, signal, _) in zip(rows, keys, strict=True):
        assert row["draws"] == (10 if signal == "random" else 1)
        assert (row["accuracy_sd"] is None) == (signal != "random")
        assert row["retained"] == row["accuracy"] / rows[0]["accuracy"]
        assert row["model"]["experts_per_input"] == {"1.0": 128, "1/8": 16, "0": 0}[keep]
        if signal != "random":
            assert row["accuracy"] == row["model"]["accuracy"]
        if scope in ("input", "batch"):
            assert row["difference"]["size_reduction"] <= 0
    of = dict(zip(keys, rows, strict=True))
    assert of["1/8", "static", "random", "none"]["accuracy_sd"] > 0
    assert of["1/8", "static", "random", "none"]["accuracy"] < of["1/8", "static", "combine", "none"]["accuracy"]


def test_sweep_is_restricted_by_options_and_keeps_its_controls(single, small_analysis, run_json):
    words = "--limit 30 --sweep 1/16,8 --scope input --signal deviation --compensate none --compensate renorm"
    found = run_json(f"eval {single} --data digits --analysis {small_analysis} {words}")
    keys = keys_of(found["rows"])
    ways = product(["1/16", "8"], [("input", "deviation"), ("static", "random")], ["none", "renorm"])
    tried = [(keep, scope, signal, compensate) for keep, (scope, signal), compensate in ways]
    assert keys == [("1.0", None, None, None), *tried, ("0", "static", "combine", "none")]
    of = dict(zip(keys, found["rows"], strict=True))
    for signal in ("deviation", "random"):
        scope = "static" if signal == "random" else "input"
        share, number = of["1/16", scope, signal, "none"], of["8", scope, signal, "none"]
        assert {**share, "keep": "8"} == number  # 1/16 of 128


def test_a_sweep_row_equals_prune_and_eval(single, small_analysis, prune, run_json):
    ways = "--sweep 1/8 --scope static --signal combine --compensate lstsq"
    sweep = run_json(f"eval {single} --data digits --limit 60 --analysis {small_analysis} {ways}")
    path, _ = prune("--keep 1/8 --signal combine --compensate lstsq")
    alone = run_json("eval", path, "--data", "digits", "--limit", 60, "--baseline", single)
    [row] = [row for row in sweep["rows"] if row["keep"] == "1/8" and row["signal"] == "combine"]
    assert row["model"] == alone["model"]
    assert row["difference"] == alone["difference"]


# --- files and repeatability
@pytest.mark.parametrize("output_format", get_args(Format))
@pytest.mark.parametrize("command", ["inspect", "eval"])
def test_output_file_gets_what_stdout_would(single, run, tmp_path, command, output_format):
    data = "--data digits --limit 20" if command == "eval" else ""
    call, path = f"{command} {single} {data} --output-format {output_format}", tmp_path / "report"
    assert run(f"{call} --output-file {path}") == (0, "", "")
    assert path.read_text(encoding="utf-8") == run(call).stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


def test_force_replaces_outputs(single, run, tmp_path):
    pruned, report = tmp_path / "pruned.safetensors", tmp_path / "report.json"
    pruned.write_text("old")
    report.write_text("old")
    report_to = f"--output-file {report} --output-format json"
    assert run(f"prune {single} --keep 1/8 {PAPER} -o {pruned} --force {report_to}") == (0, "", "")
    assert json.loads(report.read_text())["checkpoint"] == str(pruned)
    assert details(pruned)["plan"][LAYER]["scope"] == "input"
    assert {entry.name for entry in tmp_path.iterdir()} == {"pruned.safetensors", "report.json"}


def test_equal_analyses_give_equal_bytes(single, small_analysis, run, tmp_path):
    path = tmp_path / "again.safetensors"
    run("analyze", single, "--data", "digits", "--limit", 60, "-o", path)
    assert path.read_bytes() == small_analysis.read_bytes()


@pytest.mark.parametrize(("scope", "compensate"), [("static", "lstsq"), ("input", "mean"), ("batch", "none")])
def test_equal_prunings_give_equal_bytes(prune, scope, compensate):
    options = f"--keep 1/8 --scope {scope} --compensate {compensate}"
    (first, _), (second, _) = prune(options), prune(options)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("scope", SCOPES)
def test_random_experts_depend_on_the_seed_alone(vit, prune, scope):
    options = f"--keep 1/8 --scope {scope} --signal random --compensate none --seed"
    files = [prune(f"{options} {seed}", vit, None)[0] for seed in (3, 3, 4)]
    first, again, other = (path.read_bytes() for path in files)
    assert first == again
    assert first != other
    if scope == "static":
        plans = [details(path)["plan"] for path in files]
        kept = [{tuple(layer["kept"]) for layer in plan.values()} for plan in plans]
        assert len(kept[0]) == len(soft_moe(vit))  # each layer draws its own
        assert kept[0].isdisjoint(kept[2])


def test_equal_evals_print_equal_bytes(pruned, single, run):
    for output_format in ("text", "json"):
        call = f"eval {pruned} --data digits --baseline {single} --limit 50 --output-format {output_format}"
        first, second = (run(call).stdout for _ in range(2))
        assert first == second != ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_precision_runs_and_is_pruned_in_it(single, prune, run_json, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    moeprune.save(moeprune.load(single).to(dtype), path)
    found = run_json("eval", path, "--data", "digits", "--baseline", single, "--limit", 60)
    assert found["model"]["bytes"] == tensor_bytes(single) * dtype.itemsize // 4
    assert found["difference"]["agreement"] > 0.95
    if dtype != torch.float16:
        pruned, _ = prune("--keep 1/8 --compensate lstsq --data digits --limit 60", path, None)
        kinds = {tensor["dtype"] for tensor in header(pruned).values()}
        assert kinds == {"BF16" if dtype == torch.bfloat16 else "F64"}
        judged = run_json(f"eval {pruned} --data digits:calibration --limit 60 --baseline {path}")
        assert judged["difference"]["agreement"] > 0.8


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "cp1252"])
def test_stdout_that_is_not_utf8_gets_text_all_the_same(single, tmp_path, charset):
    call = f"prune {single} --keep 1/8 {PAPER} -o {tmp_path}/pruned.safetensors"
    result = CliRunner(charset=charset).invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "blocks.0.soft_moe" in result.stdout


# --- demo
@pytest.mark.slow
def test_demo_leaves_checkpoints_analyses_evals_and_a_summary(single, vit, run, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moeprune.demo.language.SPLITS", {"calibration": 20_000, "test": 10_000})  # for minutes less
    monkeypatch.setattr("moeprune.pruning.prune.FEW_TOKENS", 10_000)
    output = Path("moeprune-demo")
    result = run("demo")
    assert result.code == 0
    assert without_numbers(result.stdout) == without_numbers(block(GUIDE, "text"))
    steps = result.stderr.splitlines()
    assert [step.split(":")[0] for step in steps] == ["single"] * 19 + ["vit"] * 19 + ["language"] * 13
    saved = {
        "static-auto-1-8": ("1/8", "auto"), "static-renorm-refit-1-8": ("1/8", "drop-in: static, renorm-refit"),
        "input-none-1-8": ("1/8", "paper's rule: input, none"), "static-linear-0": ("0", "no MoE at all: linear"),
    }  # fmt: skip
    language = output / "language"
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith("language/")}
    expected = {"summary.json"}
    for model in ("single", "vit"):
        expected |= {f"{model}/full.safetensors", f"{model}/full.json", f"{model}/analysis.safetensors"}
        expected |= {f"{model}/{name}.{suffix}" for name in saved for suffix in ("safetensors", "json")}
    assert files == expected
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == {"schema_version", "warnings", "directory", "models", "language", "environment"}
    assert complaints("demo", summary) == []
    assert set(summary["models"]) == {"single", "vit"}
    for name, shipped in (("single", single), ("vit", vit)):
        assert (output / name / "full.safetensors").read_bytes() == shipped.read_bytes()
        rows = summary["models"][name]["rows"]
        of = {(row["keep"], row["label"]): row for row in rows}
        ways = {
            "auto", "drop-in: static, renorm-refit", "static by gram, mean", "paper's rule: input, none",
            "random: static, none",
        }  # fmt: skip
        assert len(rows) == len(of)
        assert set(of) == {("1.0", None), ("0", "static by combine, affine"), ("0", "static by combine, none")} | {
            ("0", "no MoE at all: linear"), *((keep, way) for keep in ("1/32", "1/16", "1/8") for way in ways)
        }  # fmt: skip
        for file, key in saved.items():
            found = json.loads((output / name / f"{file}.json").read_text())
            assert complaints("eval", found) == []
            assert found["model"] == of[key]["model"]
            assert found["model"]["bytes"] == tensor_bytes(output / name / f"{file}.safetensors")
        assert of["1/8", "random: static, none"]["draws"] == 10
        check_what_is_promised(name, of)
    check_language(language, summary["language"]["rows"])
    again = run("demo")
    assert again.code == 2
    assert again.stderr.startswith(f"error: `{output}` is not empty")


@pytest.mark.parametrize(("error", "code"), [(moeprune.MoepruneError("no more"), 2), (KeyboardInterrupt(), 130)])
def test_a_demo_that_fails_leaves_everything_as_it_was(error, code, run, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("moeprune.demo.run.analyze", fail)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "single").write_text("old")
    for output, options in ((tmp_path / "new", ""), (tmp_path, "--force")):
        assert run("demo", "-o", output, *options.split()).code == code
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["mine", "mine/single"]


def check_language(folder, rows):
    """The folders that were written are what the rows say; refits and narrower experts beat what repairs nothing."""
    assert all((folder / name).is_file() for name in ("calibration.jsonl", "test.jsonl", "full/config.json"))
    increase = {(row["label"], row["keep"]): row["difference"]["loss_increase"] for row in rows}
    assert increase[None, "1.0"] == 0
    for keep in ("1/2", "1/4"):
        reap = increase["REAP: reap, renorm", keep]
        assert increase["drop-in: gram, renorm-refit", keep] < 0.8 * reap
        assert increase["drop-in: narrower experts, width", keep] < 0.8 * reap
        for name, label in (("renorm-refit", "gram, renorm-refit"), ("width", "narrower experts, width")):
            path = folder / f"{name}-{keep.replace('/', '-')}"
            found = json.loads(path.with_suffix(".json").read_text())
            assert complaints("eval-language", found) == []
            assert found["difference"]["loss_increase"] == increase[f"drop-in: {label}", keep]
            assert found["model"]["bytes"] == tensor_bytes(path / "model.safetensors")


def check_what_is_promised(model, of):
    """The figures that the shipped checkpoints must reach on the test split."""
    full = of["1.0", None]["accuracy"]
    assert all(of[keep, "auto"]["retained"] >= 0.98 for keep in ("1/32", "1/16", "1/8"))
    if model == "vit":
        assert full >= 0.93
        assert full - of["1/8", "static by gram, mean"]["accuracy"] <= 0.01
        return
    assert full >= 0.96
    assert of["1/8", "paper's rule: input, none"]["retained"] >= 0.97
    assert of["1/8", "random: static, none"]["retained"] <= 0.5
    assert of["1/8", "drop-in: static, renorm-refit"]["retained"] >= 0.93


# --- checkpoints of other programs
@pytest.mark.parametrize("kind", ["foreign.pt", "shards"])
def test_a_checkpoint_of_another_library_is_taken_where_ours_is(stock, run_json, tmp_path, kind):
    data = stock.path("data.npz")
    options = {"dense.safetensors": "", kind: f"{SOURCE_ARGS} --preprocess mean=0.3 --preprocess std=0.4"}
    analyses, plans, differences = [], [], []
    for name, given in options.items():
        full, analysis, pruned = stock.path(name), tmp_path / f"{name}.analysis", tmp_path / f"{name}.pruned"
        analyses.append(run_json(f"analyze {full} {given} --data {data} -o {analysis}")["layers"])
        prune = f"prune {full} {given} --analysis {analysis} --keep 2 --compensate mean -o {pruned}"
        plans.append(run_json(prune))
        judge = f"eval {pruned} --data {data} --baseline {full} {given} --min-agreement 0"
        differences.append(run_json(judge)["difference"])
    masses = [[layer["best_eighth_mass"] for layer in layers.values()] for layers in analyses]
    assert masses[0] == pytest.approx(masses[1], rel=1e-5)
    assert differences[0]["accuracy_drop"] == differences[1]["accuracy_drop"]
    assert plans[0]["plan"] == plans[1]["plan"]
    pruned = [header(tmp_path / f"{name}.pruned") for name in options]
    assert pruned[0] == pruned[1]
    reading = run_json("inspect", stock.path(kind), *SOURCE_ARGS.split())["reading"]
    assert reading["library"] == "soft-moe"
    assert reading["arguments"]["num_heads"] == 2


def test_a_checkpoint_goes_back_to_its_library(stock, run_json, tmp_path):
    found = run_json("export", stock.path("dense.safetensors"), "--to", "soft-moe", "-o", tmp_path / "back.pt")
    assert found["to"] == "soft-moe"
    back = run_json("inspect", tmp_path / "back.pt", *SOURCE_ARGS.split())
    assert back["parameters"] == run_json("inspect", stock.path("dense.safetensors"))["parameters"]


# --- the entry point
def test_version(program):
    assert program("--version") == (0, f"moeprune {moeprune.__version__}\n", "")


def ends_and_imports(calls: list[str], *libraries: str) -> list[str]:
    """How commands end in a process of their own, and which of these libraries are imported by then."""
    program = f"""
import sys
from moeprune.cli import app
for call in {calls!r}:
    try:
        app(call.split())
    except SystemExit as end:
        print("\\nended:", end.code, *(set({libraries!r}) & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [line.removeprefix("ended: ") for line in result.stdout.splitlines() if line.startswith("ended: ")]


def test_help_wrong_options_and_missing_files_do_not_import_torch(single, single_analysis):
    help_texts = ["--help", *(f"{command} --help" for command in COMMANDS)]
    assert ends_and_imports(help_texts, "torch", "numpy", "scipy", "matplotlib") == ["0"] * len(help_texts)
    wrong = [
        "prune x --keep 0 -o y", "prune x --keep 1/8 --scope some -o y", "eval x --data y --min-accuracy 7",
        "eval x --data y --sweep 1/8", "inspect x --output-format yaml", "inspect", "export x -o y --to nothing",
        "inspect x --source nothing", "prune x --keep 2 -o y --source-arg nothing",
        "inspect missing", "eval missing --data digits", f"eval {single} --data missing.npz",
        f"eval {single} --data digits --baseline missing", f"prune {single} --keep 2 -o y --analysis missing",
        f"prune {single} --analysis {single_analysis} --plan missing -o y",
    ]  # fmt: skip
    assert ends_and_imports(wrong, "torch") == ["2"] * len(wrong)


def test_inspect_imports_neither_torch_nor_numpy(single, tmp_path):
    calls = [f"inspect {single}", f"inspect {single} --output-file {tmp_path / 'report'}"]
    assert ends_and_imports(calls, "torch", "numpy", "safetensors") == ["0", "0"]


def test_the_values_of_a_checkpoint_are_not_read_to_inspect_it(single, run, tmp_path):
    """The file has a hole of a terabyte in their place."""
    metadata = details(single)
    metadata["architecture"]["blocks"][0]["soft_moe"]["hidden_dim"] = 30_000_000
    entries, size = {}, 0
    for name, shape in architecture_from_json(metadata["architecture"]).shapes({}).items():
        start, size = size, size + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, size]}
    whole = with_metadata(with_header(json.dumps(entries), b""), json.dumps(metadata))
    path = tmp_path / "large.safetensors"
    path.write_bytes(whole)
    os.truncate(path, len(whole) + size)
    with time_limit(PATIENCE):
        result = run("inspect", path)
    assert (result.code, result.stderr) == (0, "")
    assert size > 9e11
    assert f"{size / 1e9:.0f} GB" in result.stdout


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("variable", ["TERM=dumb", "GITHUB_ACTIONS=true", "NO_COLOR=1"])
def test_help_and_usage_errors_have_no_escape_codes(variable, program, monkeypatch):
    monkeypatch.setenv(*variable.split("="))
    shown, wrong = program("prune", "--help"), program("prune", "--nonsense")
    assert (shown.code, wrong.code, wrong.stdout) == (0, 2, "")
    assert "--compensate" in shown.stdout
    assert "--nonsense" in wrong.stderr
    assert "\x1b" not in shown.stdout + wrong.stderr


@pytest.mark.slow
def test_the_entry_point_tells_a_failed_gate_from_a_wrong_call(stock, program, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("TERM", "dumb")
    gate = program("eval", *stock.dense_and_data, "--min-accuracy", 1)
    assert (gate.code, gate.stderr) == (1, "")
    assert "FAILED" in gate.stdout
    assert "\x1b" not in gate.stdout
    refusal(program, ["eval", *stock.dense_and_data, "--min-accuracy", 7], "`--min-accuracy 7.0` is outside 0…1\n")


def test_a_reader_that_stops_reading_gets_no_traceback(single):
    command = [sys.executable, "-m", "moeprune", "inspect", str(single)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (2, b"")


def ends_with(error: BaseException, monkeypatch, run):
    """How `inspect` ends if the code that it calls prints a line and raises an error."""

    def fail(*_: object) -> None:
        print("a line")
        raise error

    monkeypatch.setattr("moeprune.models.inspection.inspect_checkpoint", fail)
    return run("inspect", __file__)


def test_an_unexpected_error_exits_with_2_and_a_traceback(monkeypatch, run):
    """Under Typer an uncaught exception would exit with 1, as a failed gate does."""
    result = ends_with(ZeroDivisionError("boom"), monkeypatch, run)
    assert (result.code, result.stdout) == (2, "")
    assert "ZeroDivisionError: boom" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: moeprune failed")


@pytest.mark.parametrize("code", [0, 1, None, "over"])
def test_code_that_ends_the_program_is_an_error_and_what_it_prints_is_not_the_report(monkeypatch, run, code):
    result = ends_with(SystemExit(code), monkeypatch, run)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr.startswith("a line\nerror: ")


KEPT = {"0.1": 13, "16": 16, "1/1000": 1, "1": 1, 16: 16, 0.125: 16, "0.125": 16, Fraction(1, 8): 16}


@pytest.mark.parametrize(("keep", "k"), [*KEPT.items(), (1.0, 128), (Fraction(1), 128), (1, 1)])
def test_shares_are_rounded_to_the_nearest_number_of_experts(single, keep, k):
    way = {"scope": "input", "signal": "combine", "compensate": "none"}
    [layer] = moeprune.prune(moeprune.load(single), keep=keep, **way).moe_layers.values()
    assert layer.plan.k == k


@pytest.mark.slow
def test_a_narrow_terminal_cuts_no_table(single, stock, tmp_path, monkeypatch):
    """On 80 columns lines wrap, but no cell loses a character."""
    monkeypatch.setenv("TERM", "dumb")
    call = f"analyze {single} --data {stock.path('data.npz')} -o {tmp_path}/a.safetensors"
    shown = on_a_terminal(call, "stdout", columns=80)
    assert "unused" in shown
    assert "…" not in shown


@pytest.mark.parametrize(("right", "passes"), [(95, True), (94, False)])
def test_a_gate_passes_exactly_at_its_limit(right, passes):
    """One of 100 inputs lost is a drop of 0.01, whatever the floats 0.96 - 0.95 say."""
    labels = torch.zeros(100, dtype=torch.int64)
    model, full = (Predictions(labels, (torch.arange(100) >= count).long(), 1.0, 0.0, {}) for count in (right, 96))
    result = replace(evaluation(right, 1), difference=compare(cost(900), cost(1000), model, full))
    [drop, *reductions] = judge(
        result, {"max_accuracy_drop": 0.01, "min_flops_reduction": 0.1, "min_size_reduction": 0.1}
    )
    assert drop.passed is passes
    assert all(gate.passed for gate in reductions)


@pytest.mark.parametrize("scope", ["static", "input"])
def test_a_model_and_what_is_pruned_from_it_do_not_touch_each_other(single, scope):
    model = moeprune.load(single).requires_grad_(True).train()
    images = torch.rand(3, 1, 8, 8)
    before = model(images).detach()
    pruned = moeprune.prune(model, keep="1/8", scope=scope, compensate="mean", data="digits")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = pruned(images)
    model.double()
    assert torch.equal(pruned(images), expected)
    model.float()
    pruned.double()
    assert torch.equal(model(images), before)
    with pytest.raises(RuntimeError, match="does not require grad"):
        pruned(images.double()).sum().backward()


@pytest.mark.slow
def test_an_analysis_and_other_uses_of_the_model_do_not_disturb_each_other(single):
    """Each thread gets what it would get alone."""
    model = moeprune.load(single)
    data = moeprune.open_data("digits:calibration", model.input_format, limit=100)
    alone = moeprune.analyze(model, data).layers[LAYER]
    with ThreadPoolExecutor(3) as pool:
        same = [moeprune.open_data("digits:calibration", model.input_format, limit=300) for _ in range(2)]
        analyses = [pool.submit(moeprune.analyze, model, data) for data in same]
        again = pool.submit(moeprune.analyze, model, data)
        for _ in range(20):
            model(torch.rand(8, 1, 8, 8))
    first, second = (future.result().layers[LAYER] for future in analyses)
    assert torch.equal(first.gram, second.gram)
    torch.testing.assert_close(again.result().layers[LAYER].gram, alone.gram)


def test_a_baseline_of_other_weights_is_warned_of(pruned, single, run, tmp_path):
    model = moeprune.load(single)
    with torch.no_grad():
        model.head.weight.mul_(2)
    moeprune.save(model, tmp_path / "other.safetensors")
    result = run(f"eval {pruned} --data digits --limit 9 --baseline {tmp_path}/other.safetensors")
    assert result.code == 0
    assert "was not pruned from" in result.stderr


@pytest.mark.parametrize("closing", ["2>&-", ">&-", ">&- 2>&-"])
def test_closed_streams(closing):
    command = f'"{sys.executable}" -m moeprune inspect nothing.safetensors {closing}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
