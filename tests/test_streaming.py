"""Static pruning from file to file gives the bytes that pruning in memory gives."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

import moeprune
from moeprune.calibration.analysis import load_analysis, save_analysis
from moeprune.files import checkpoint
from moeprune.files.header import read_header
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.model import fingerprint
from moeprune.models.request import ModelSpec
from moeprune.models.vit import SoftMoEViT
from moeprune.pruning.checkpoint import prune_checkpoint
from moeprune.pruning.request import PruneRequest
from tests.endings import PATIENCE
from tests.stock import STATIC, some_slow

CHOICES = list(product(("combine", "deviation", "random"), ("none", "renorm", "mean"), ("1", "1/8", "1/1")))


def prune_file(path, output, **choice) -> None:
    """Prune in one shot, from file to file."""
    prune_checkpoint(PruneRequest(checkpoint=ModelSpec(path=path), output=output, one_shot=True, **choice))


@pytest.mark.mostly_slow(6)
@pytest.mark.parametrize(("signal", "compensate", "keep"), some_slow(CHOICES, 3))
@pytest.mark.parametrize("which", ["single", "vit"])
def test_bytes_are_those_of_pruning_in_memory(which, signal, compensate, keep, request, tmp_path):
    path, analysis = request.getfixturevalue(which), request.getfixturevalue(f"{which}_analysis")
    choice = {"keep": keep, "signal": signal, "compensate": compensate, "seed": 3}
    expected, found = tmp_path / "expected.safetensors", tmp_path / "found.safetensors"
    moeprune.save(moeprune.prune(moeprune.load(path), load_analysis(analysis), one_shot=True, **choice), expected)
    prune_file(path, found, analysis=analysis, **choice)
    assert found.read_bytes() == expected.read_bytes()


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype, single, single_analysis, tmp_path):
    names = ("model", "analysis", "expected", "found")
    path, analyzed, expected, found = (tmp_path / f"{name}.safetensors" for name in names)
    moeprune.save(moeprune.load(single).to(dtype), path)
    analysis = moeprune.analyze(moeprune.load(path), "digits:calibration", moeprune.Runtime("cpu"))
    moeprune.save(moeprune.prune(moeprune.load(path), analysis, keep="1/8", compensate="mean"), expected)
    save_analysis(analysis, analyzed)
    prune_file(path, found, analysis=analyzed, keep="1/8", compensate="mean")
    assert found.read_bytes() == expected.read_bytes()


def test_command_in_one_shot_needs_no_data(printed, vit, vit_analysis, tmp_path):
    expected, found, measured = (tmp_path / f"{name}.safetensors" for name in ("expected", "found", "measured"))
    prune_file(vit, expected, analysis=vit_analysis, keep="1/8", signal="combine", compensate="none")
    call = f"prune {vit} --analysis {vit_analysis} --keep 1/8 {STATIC}"
    printed(f"{call} --one-shot -o {found}")
    assert found.read_bytes() == expected.read_bytes()
    printed(f"{call} -o {measured}")
    assert measured.read_bytes() != expected.read_bytes()


def test_tensors_edited_since_the_analysis_are_not_pruned(run, single, single_analysis, tmp_path):
    """Whatever the metadata says."""
    path, target = tmp_path / "model.safetensors", tmp_path / "pruned.safetensors"
    header = read_header(single)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.read_tensors(header).items()}
    tensors["blocks.0.soft_moe.fc1_weight"].view(-1)[-1] += 1
    checkpoint.write(path, tensors, header.metadata | {"fingerprint": fingerprint(moeprune.load(single))})
    for streamed in (["--one-shot"], []):
        words = "--keep", "1/8", *STATIC.split(), "-o", target, *streamed
        result = run("prune", path, "--analysis", single_analysis, *words)
        assert result.code == 2
        assert "the analysis was made for another checkpoint" in result.stderr
        assert not target.exists()


def test_values_that_are_not_finite_leave_no_file(single, tmp_path):
    whole = bytearray(single.read_bytes())
    offset = read_header(single).offsets["blocks.0.soft_moe.fc1_weight"]
    path, target = tmp_path / "model.safetensors", tmp_path / "pruned.safetensors"
    whole[offset : offset + 4] = b"\xff" * 4
    path.write_bytes(whole)
    with pytest.raises(moeprune.MoepruneError, match=r"NaN or infinite values in `blocks\.0\.soft_moe\.fc1_weight`"):
        prune_file(path, target, keep="1/1", signal="random", compensate="none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_a_file_that_changes_while_it_is_pruned(monkeypatch, single, tmp_path):
    path, target = tmp_path / "model.safetensors", tmp_path / "pruned.safetensors"
    path.write_bytes(single.read_bytes())

    def encode(*arguments, encode=checkpoint._encode):
        path.write_bytes(single.read_bytes())
        os.utime(path, ns=(1, 1))
        return encode(*arguments)

    monkeypatch.setattr(checkpoint, "_encode", encode)
    with pytest.raises(moeprune.MoepruneError, match="was replaced while it was read"):
        prune_file(path, target, keep="4", signal="random", compensate="none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_tensors_of_many_blocks(monkeypatch, single, single_analysis, tmp_path):
    written = []
    for block in (checkpoint.BLOCK, 64):
        monkeypatch.setattr(checkpoint, "BLOCK", block)
        path = tmp_path / f"{block}.safetensors"
        prune_file(single, path, analysis=single_analysis, keep="1/8", signal="combine", compensate="none")
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts in kilobytes")
def test_memory_does_not_grow_with_the_file(tmp_path):
    moe = BlockConfig(soft_moe=SoftMoEConfig(256, 64, 1, 1024))
    model = SoftMoEViT(ViTConfig((16, 16), (8, 8), 3, 10, 256, 4, (moe, moe)))
    path = tmp_path / "model.safetensors"
    moeprune.save(model, path)
    assert path.stat().st_size > 256 << 20
    benchmark = Path(__file__).parent / "benchmarks" / "streaming.py"
    call = [sys.executable, benchmark, path, tmp_path / "pruned.safetensors", "1/2"]
    assert int(subprocess.check_output(call, text=True, timeout=PATIENCE)) < 16  # MB
