"""The README's commands and code do what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lxml import etree
from PIL import Image
from torch import nn

import moeprune
from moeprune.data.digits import digits
from tests import peers

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(text):
    """The arguments of each moeprune command in a text."""
    return [shlex.split(line)[1:] for line in re.findall(r"moeprune [a-z]+ .*", text)]


def without_numbers(text):
    """Its words, line by line: another CPU may round a last digit otherwise."""
    lines = (line for line in text.splitlines() if line.strip())
    return [re.sub(r"[+-]?\d+(\.\d+)?(e-\d+)?", "0", line).split() for line in lines]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The digits as arrays and as folders of images."""
    root = tmp_path_factory.mktemp("images")
    for name in ("calibration", "test"):
        pixels, labels = (tensor.numpy() for tensor in digits(name))
        pixels = np.round(pixels * 255).astype(np.uint8)
        np.savez(root / f"{name}.npz", inputs=pixels, labels=labels)
        for index, label in enumerate(labels):
            folder = root / name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index, 0]).save(folder / f"{index}.png")
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch, single, images):
    """What the README's commands read, in the current directory."""
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(single.read_bytes())
    for path in images.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


def test_transcript_at_the_top(workplace, run):
    transcript = blocks("console")[0]
    printed = dict(re.findall(r"^\$ moeprune (.*)\n((?:(?!\$ ).*\n)*)", transcript, flags=re.MULTILINE))
    assert "moeprune/demo/checkpoints/single.safetensors model.safetensors" in transcript
    assert [line.split()[0] for line in printed] == ["analyze", "prune", "eval"]
    for line, expected in printed.items():
        result = run(*shlex.split(line))
        assert (result.code, result.stderr) == (0, "")
        if expected:
            assert without_numbers(result.stdout) == without_numbers(expected)


def test_commands_for_a_checkpoint_of_ones_own(workplace, run):
    [block] = [block for block in blocks("sh") if "inspect" in block]
    for arguments in commands(block):
        result = run(*arguments)
        assert (result.code, result.stderr) == (0, ""), arguments


def test_commands_for_budgets_and_plans(workplace, run):
    [block] = [block for block in blocks("sh") if "--max-size" in block]
    analyze = ("analyze", "model.safetensors", "--data", "calibration/", "-o", "analysis.safetensors")
    assert run(*analyze).code == 0
    for arguments in commands(block):
        result = run(*arguments)
        assert (result.code, result.stderr) == (0, ""), arguments


def recipes():
    """The shell steps of each CI recipe, without those that install."""
    github, gitlab = (yaml.safe_load(block) for block in blocks("yaml"))
    [job], steps = github["jobs"].values(), gitlab["prune"]["script"]
    return {
        "github": [
            step["run"] for step in job["steps"] if "run" in step and "pip install" not in step["run"]
        ],
        "gitlab": [step for step in steps if "pip install" not in step],
    }


@pytest.fixture(params=["github", "gitlab"])
def recipe(request, workplace, monkeypatch):
    """The steps of a recipe, where training has left its files and the configuration stands beside them."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workplace / "summary.md"))
    [configuration] = blocks("toml")
    Path("moeprune.toml").write_text(configuration, encoding="utf-8")
    return request.param, recipes()[request.param]


def check_what_a_recipe_leaves(name, report, verdict):
    page = Path("report.html").read_text(encoding="utf-8")
    assert {"passed": ">passed<", "failed": ">FAILED<"}[verdict] in page
    assert "Experts of <code>blocks.0.soft_moe</code>" in page
    if name == "github":
        assert {"passed": "::notice title", "failed": "::error title"}[verdict] in report
        written = Path("summary.md").read_text(encoding="utf-8")
        assert written.count("\n## ") == 3
        assert {"passed": "✅ passed: pruned", "failed": "❌ FAILED: pruned"}[verdict] in written
    else:
        assert report == ""
        failures = etree.parse("gates.xml").findall(".//failure")
        assert len(failures) == {"passed": 0, "failed": 1}[verdict]


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_ci_recipe(recipe, run, monkeypatch, verdict):
    name, steps = recipe
    if verdict == "failed":
        monkeypatch.setenv("MOEPRUNE_EVAL_MIN_SIZE_REDUCTION", "0.99")
    words = [shlex.split(step)[1:] for step in steps]
    assert [step[0] for step in words] == ["analyze", "prune", "eval"]
    *before, judged = [run(*step) for step in words]
    assert [(result.code, result.stderr) for result in before] == [(0, "")] * 2
    assert (judged.code, judged.stderr) == ({"passed": 0, "failed": 1}[verdict], "")
    check_what_a_recipe_leaves(name, judged.stdout, verdict)


@pytest.mark.slow
@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_ci_recipe_in_a_shell(recipe, workplace, monkeypatch, verdict):
    """As a runner does it: the steps one after the other, each ending at the first command that fails."""
    name, steps = recipe
    Path("bin").mkdir()
    tool = Path("bin/moeprune")
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m moeprune "$@"\n')
    tool.chmod(0o755)
    root = Path(moeprune.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("PATH", f"{workplace / 'bin'}:{os.environ['PATH']}")
    if verdict == "failed":
        monkeypatch.setenv("MOEPRUNE_EVAL_MIN_SIZE_REDUCTION", "0.99")
    ended = [subprocess.run(["bash", "-ec", step], capture_output=True, text=True) for step in steps]
    assert [step.returncode for step in ended] == [0, 0, {"passed": 0, "failed": 1}[verdict]]
    assert [step.stderr for step in ended] == ["", "", ""]
    check_what_a_recipe_leaves(name, ended[-1].stdout, verdict)


def test_python_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        exec(block, {})
    assert moeprune.load("model.safetensors").config.moe_layers


@pytest.mark.slow
def test_demo_prints_what_the_readme_shows(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    result = run("demo")
    assert result.code == 0
    [shown] = blocks("text")
    assert without_numbers(result.stdout) == without_numbers(shown)


def test_commands_for_soft_moe(workplace, run):
    if not peers.has("soft_moe"):
        pytest.skip("soft-moe is not installed")
    from soft_moe.vision_transformer import SoftMoEVisionTransformer

    model = SoftMoEVisionTransformer(
        num_experts=8, img_size=16, patch_size=8, num_classes=10, embed_dim=24, depth=2, num_heads=6,
        moe_layer_index=1,
    )  # fmt: skip
    torch.save(model.state_dict(), "model.pt")
    Path("model.safetensors").unlink()
    [block] = [block for block in blocks("sh") if "--source-arg" in block]
    for command in commands(block):
        assert run(*command).code == 0
    smaller = SoftMoEVisionTransformer(
        num_experts=2, img_size=16, patch_size=8, num_classes=10, embed_dim=24, depth=2, num_heads=6,
        moe_layer_index=1,
    )  # fmt: skip
    smaller.load_state_dict(torch.load("pruned.pt", weights_only=True), strict=True)


def test_commands_for_a_model_of_ones_own_code(workplace, run, monkeypatch):
    soft_moe_pytorch = pytest.importorskip("soft_moe_pytorch")

    def build(depth):
        return nn.Sequential(
            nn.Conv2d(3, 12, 56, 56),
            *(soft_moe_pytorch.SoftMoE(12, num_experts=8, num_slots=1) for _ in range(depth)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
        )  # fmt: skip

    module = type(sys)("mypackage.models")
    module.build = build
    monkeypatch.setitem(sys.modules, "mypackage", type(sys)("mypackage"))
    monkeypatch.setitem(sys.modules, "mypackage.models", module)
    torch.save({"state_dict": build(depth=4).state_dict()}, "model.pt")
    Path("model.safetensors").unlink()
    [block] = [block for block in blocks("sh") if "--model-arg" in block]
    analyze, prune, export = commands(block)
    for command in ((*analyze, "--limit", 20), prune, export):
        assert run(*command).code == 0
    assert len(torch.load("pruned.pt", weights_only=True)["1.slot_embeds"]) == 2
