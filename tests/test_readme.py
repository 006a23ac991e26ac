"""The commands, code, figures and links of the README, the guide and the map of the package."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from lxml import etree
from PIL import Image
from torch import nn

import moeprune
from moeprune.data.datasets import digits
from moeprune.plan import is_possible
from tests import peers
from tests.test_layout import LEVELS

ROOT = Path(__file__).parents[1]
README, GUIDE, MAP, BENCHMARKS = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "moeprune/guide.md", "moeprune/README.md", "tests/benchmarks/README.md")
)


def block(text, language, containing=""):
    """The only fenced block of a language that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    [found] = [block for block in blocks if containing in block]
    return found


def commands(text):
    """The arguments of each moeprune command in a block."""
    lines = re.findall(r"^moeprune .*", text.replace("\\\n", " "), flags=re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def without_numbers(text):
    """The words of each line: the last digits depend on the CPU, and so does the width of a table."""
    lines = (line for line in text.splitlines() if line.strip())
    return [re.sub(r"[+-]?\d+(\.\d+)?(e-\d+)?", "0", line.replace("─", "")).split() for line in lines]


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
    """A working directory with the data and the checkpoint that the commands read."""
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(single.read_bytes())
    for path in images.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


def run_all(run, words):
    for arguments in words:
        result = run(*arguments)
        assert (result.code, result.stderr) == (0, ""), arguments


def test_transcript_at_the_top_and_the_figures_of_the_guide(workplace, run):
    transcript = block(README, "console")
    assert README[: README.index(transcript)].count("\n") < 20
    printed = dict(re.findall(r"^\$ moeprune (.*)\n((?:(?!\$ ).*\n)*)", transcript, flags=re.MULTILINE))
    assert "moeprune/demo/checkpoints/single.safetensors model.safetensors" in transcript
    assert [line.split()[0] for line in printed] == ["prune", "eval"]
    for line, expected in printed.items():
        result = run(*shlex.split(line))
        assert (result.code, result.stderr) == (0, "")
        if expected:
            assert without_numbers(result.stdout) == without_numbers(expected)
    for option, first, code in (("--latency", "latency on", 0), ("--confidence", "gate ", 1)):
        [arguments] = commands(block(GUIDE, "sh", f"{option}" if code else f"{option}\n"))
        result = run(*arguments)
        assert result.code == code
        expected = [words[:1] for words in without_numbers(block(GUIDE, "console", first))]
        assert [words[:1] for words in without_numbers(result.stdout)][-len(expected) :] == expected


@pytest.mark.slow
def test_commands_for_budgets_plans_and_sweeps(workplace, run, monkeypatch):
    for option, value in (("COMPENSATE", "mean"), ("SCOPE", "static"), ("SIGNAL", "combine"), ("LIMIT", "100")):
        monkeypatch.setenv(f"MOEPRUNE_EVAL_{option}", value)  # all of them take long
    run_all(run, [("analyze", "model.safetensors", "--data", "calibration/", "-o", "analysis.safetensors")])
    run_all(run, commands(block(GUIDE, "sh", "--max-size")) + commands(block(GUIDE, "sh", "--plot")))
    assert Path("trade-off.svg").exists()


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("service", ["github", "gitlab"])
def test_ci_recipe(workplace, run, monkeypatch, service):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workplace / "summary.md"))
    if service == "github":
        job = yaml.safe_load(block(README, "yaml"))["jobs"]["prune"]
        steps = [step.get("run", "") for step in job["steps"]]
    else:
        steps = yaml.safe_load(block(GUIDE, "yaml"))["prune"]["script"]
        Path("moeprune.toml").write_text(block(GUIDE, "toml"), encoding="utf-8")
    *before, judge = [shlex.split(step)[1:] for step in steps if step.startswith("moeprune ")]
    assert [step[0] for step in before] == ["prune"]
    run_all(run, before)
    for passes in (True, False):
        if not passes:
            monkeypatch.setenv("MOEPRUNE_EVAL_MIN_ACCURACY", "0.999")
        result = run(*judge, *([] if passes else ["--force"]))
        assert (result.code, result.stderr) == (0 if passes else 1, "")
        assert (">passed<" if passes else ">FAILED<") in Path("report.html").read_text(encoding="utf-8")
        if service == "github":
            assert ("::notice title" if passes else "::error title") in result.stdout
            summary = Path("summary.md").read_text(encoding="utf-8")
            assert ("✅ passed: pruned" if passes else "❌ FAILED: pruned") in summary
        else:
            assert len(etree.parse("gates.xml").findall(".//failure")) == (0 if passes else 1)


def test_code_for_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block(GUIDE, "python", "SoftMoEViT"), {})
    assert moeprune.load("model.safetensors").config.moe_layers


def test_code_with_data_in_memory(workplace):
    exec(block(GUIDE, "python", "DataLoader"), {})
    assert moeprune.load("pruned.safetensors").plan


@pytest.mark.slow
def test_commands_for_soft_moe(workplace, run):
    if not peers.has("soft_moe"):
        pytest.skip("soft-moe is not installed")
    from soft_moe.vision_transformer import SoftMoEVisionTransformer

    def build(num_experts):
        return SoftMoEVisionTransformer(
            num_experts=num_experts, img_size=16, patch_size=8, num_classes=10, embed_dim=24, depth=2,
            num_heads=6, moe_layer_index=1,
        )  # fmt: skip

    torch.save(build(8).state_dict(), "model.pt")
    run_all(run, commands(block(README, "sh", "--source-arg")))
    Path("pruned.safetensors").unlink()
    exec(block(README, "python"), {})
    Path("pruned.safetensors").unlink()
    run_all(run, commands(block(GUIDE, "sh", "--source-arg")))
    build(2).load_state_dict(torch.load("pruned.pt", weights_only=True), strict=True)
    exec(block(GUIDE, "py"), {"moeprune": moeprune})


def test_commands_for_a_model_of_ones_own_code(workplace, run, monkeypatch):
    soft_moe_pytorch = pytest.importorskip("soft_moe_pytorch")

    def build(depth):
        return nn.Sequential(
            nn.Conv2d(3, 12, 56, 56), *(soft_moe_pytorch.SoftMoE(12, num_experts=8, num_slots=1) for _ in range(depth)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
        )  # fmt: skip

    for name in ("mypackage", "mypackage.models"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(build=build))
    monkeypatch.setenv("MOEPRUNE_PRUNE_LIMIT", "20")
    monkeypatch.setenv("MOEPRUNE_EVAL_LIMIT", "20")
    torch.save({"state_dict": build(depth=4).state_dict()}, "model.pt")
    run_all(run, commands(block(GUIDE, "sh", "--model-arg")))
    assert len(torch.load("pruned.pt", weights_only=True)["1.slot_embeds"]) == 2


def test_figures_of_the_table_of_methods():
    recorded = {}
    [table] = re.findall(r"hard_case.py`\n.*?```text\n(.*?)```", BENCHMARKS, flags=re.DOTALL)
    for line in re.findall(r"^(?:static|input), .*$", table, flags=re.MULTILINE):
        method, figures = re.split(r"\s{3,}", line, maxsplit=1)
        shares = re.findall(r"(\d\.\d+) \(", figures)
        recorded[tuple(method.removesuffix(" 8").split(", "))] = shares[-2] if len(shares) > 1 else shares[0]  # 1/8
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([\w-]+)`.* \|$", README, flags=re.MULTILINE)
    assert len(rows) == 14
    assert all(is_possible(*row) for row in rows)
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([\w-]+)`.* (\d\.\d+) \|$", README, flags=re.MULTILINE)
    stated = {tuple(method): figure for *method, figure in rows}
    assert stated.pop(("auto", "auto", "auto")) == recorded["static", "auto", "auto"]
    assert stated.items() <= recorded.items()


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", "moeprune/README.md", "moeprune/guide.md", "tests/benchmarks/README.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


def test_the_readme_is_short_and_the_map_is_complete():
    assert README.count("\n") <= 200
    packages = re.findall(r"^\| (`.*?) \|.*?\| (.*) \|$", MAP, flags=re.MULTILINE)
    names = [name for row, _ in packages for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert sorted(names) == sorted(LEVELS)
    for row, files in packages:
        folder = ROOT / "moeprune" / (row.strip("`") if row.endswith("/`") else "")
        assert all((folder / file).exists() for file in re.findall(r"`(.*?)`", files)), row
    for name in re.findall(r"`(\w+/\w+\.py)`", MAP.partition("## One checkpoint")[2]):
        assert (ROOT / "moeprune" / name).exists() or (ROOT / name).exists(), name
