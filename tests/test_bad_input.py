"""Whatever is wrong with a call or a file: exit code 2, an error that names it, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests.endings import files_under

SAMPLES = 12
LAYER = "blocks.0.soft_moe"
PLAN = {
    "scope": "static", "k": 2, "num_experts": 128, "signal": "combine", "compensation": "none",
    "kept": [3, 5],
}  # fmt: skip


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@dataclass
class Workshop:
    """Makes damaged files under `root`; what commands may write goes to `out`."""

    root: Path
    single: Path
    analysis: Path
    run: Callable[..., Any]
    made: int = 0
    marker: Path = field(init=False)

    def __post_init__(self) -> None:
        self.marker = self.root / "unpickled"
        self.out = self.root / "out"
        self.out.mkdir()
        self.output = self.out / "new.safetensors"

    def path(self, suffix: str) -> Path:
        self.made += 1
        return self.root / f"made{self.made}{suffix}"

    def file(self, content: bytes, suffix: str = ".safetensors") -> Path:
        path = self.path(suffix)
        path.write_bytes(content)
        return path

    def tensors(self, source: Path | None = None) -> dict[str, torch.Tensor]:
        return load_file(source or self.single)

    def metadata(self, source: Path | None = None) -> dict[str, Any]:
        with safe_open(source or self.single, "pt") as file:
            return json.loads(file.metadata()["moeprune"])

    def save(self, tensors: Mapping[str, torch.Tensor], metadata: object) -> Path:
        path = self.path(".safetensors")
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        save_file(dict(tensors), path, None if metadata is None else {"moeprune": text})
        return path

    def with_tensors(self, **changed: torch.Tensor | None) -> Path:
        """`single` with other tensors; None removes one. `__` in a name stands for a dot."""
        tensors = {**self.tensors(), **{name.replace("__", "."): t for name, t in changed.items()}}
        return self.save({n: t for n, t in tensors.items() if t is not None}, self.metadata())

    def with_metadata(self, **changed: object) -> Path:
        return self.save(self.tensors(), {**self.metadata(), **changed})

    def with_architecture(self, **changed: object) -> Path:
        return self.with_metadata(architecture={**self.metadata()["architecture"], **changed})

    def with_block(self, **changed: object) -> Path:
        [block] = self.metadata()["architecture"]["blocks"]
        return self.with_architecture(blocks=[{**block, **changed}])

    def with_soft_moe(self, **changed: object) -> Path:
        [block] = self.metadata()["architecture"]["blocks"]
        return self.with_block(soft_moe={**block["soft_moe"], **changed})

    def with_plan(self, layer: str = LAYER, **changed: object) -> Path:
        return self.with_metadata(plan={layer: {**PLAN, **changed}})

    def analysis_with(self, **changed: object) -> Path:
        return self.save(self.tensors(self.analysis), {**self.metadata(self.analysis), **changed})

    def analysis_of(self, **changed: object) -> Path:
        """The analysis with other values of its data; None removes one."""
        origin = self.metadata(self.analysis)["origin"]
        values = {**origin["data"], **changed}
        data = {key: value for key, value in values.items() if value is not None}
        return self.analysis_with(origin={**origin, "data": data})

    def analysis_tensor(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
        tensors = self.tensors(self.analysis)
        changed = change(tensors.pop(f"{LAYER}.{name}"))
        if changed is not None:
            tensors[f"{LAYER}.{name}"] = changed.contiguous()
        return self.save(tensors, self.metadata(self.analysis))

    def arrays(self, **changed: object) -> dict[str, Any]:
        """Good inputs and labels, some of them changed; None removes one."""
        inputs = np.random.default_rng(0).random((SAMPLES, 1, 8, 8), dtype=np.float32)
        arrays = {"inputs": inputs, "labels": np.arange(SAMPLES) % 10, **changed}
        return {name: array for name, array in arrays.items() if array is not None}

    def npz(self, **changed: object) -> Path:
        path = self.path(".npz")
        np.savez(path, **self.arrays(**changed))
        return path

    def compressed(self, **changed: object) -> Path:
        path = self.path(".npz")
        np.savez_compressed(path, **self.arrays(**changed))
        return path

    def claiming(self, name: str, old: str, new: str, cut: int = 0) -> Path:
        """Good arrays, but for the header of one, or without the last bytes of it, in a sound archive."""
        path = self.npz()
        with zipfile.ZipFile(path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        member = members[f"{name}.npy"]
        end = 10 + int.from_bytes(member[8:10], "little")
        header = member[10:end].replace(old.encode(), new.encode())
        values = member[end : len(member) - cut]
        members[f"{name}.npy"] = member[:8] + len(header).to_bytes(2, "little") + header + values
        with zipfile.ZipFile(path, "w") as archive:
            for key, content in members.items():
                archive.writestr(key, content)
        return path

    def encrypted(self) -> Path:
        """An archive whose directory says that its members are encrypted."""
        content = bytearray(self.npz().read_bytes())
        for place in re.finditer(b"PK\1\2", bytes(content)):
            content[place.start() + 8] |= 1
        return self.file(bytes(content), ".npz")

    def safetensors(self, **changed: object) -> Path:
        path = self.path(".safetensors")
        save_arrays({name: np.asarray(array) for name, array in self.arrays(**changed).items()}, path)
        return path

    def with_nan(self, sample: int, value: float = float("nan")) -> np.ndarray:
        inputs = self.arrays()["inputs"].copy()
        inputs[sample, 0, 3, 4] = value
        return inputs

    def folder(self, *files: str, size: tuple[int, int] = (8, 8)) -> Path:
        """A folder of grey images; a name that starts with ! is a file of text."""
        image = pytest.importorskip("PIL.Image")
        path = self.path("")
        path.mkdir()
        for label in range(10 if files else 0):
            (path / str(label)).mkdir()
        for name in files:
            target = path / name.replace("!", "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if "!" in name:
                target.write_text("no image")
            else:
                image.new("L", size, 100).save(target)
        return path

    def flat_folder(self) -> Path:
        folder = self.folder()
        pytest.importorskip("PIL.Image").new("L", (8, 8), 100).save(folder / "a.png")
        return folder

    def folder_with(self, content: bytes) -> Path:
        folder = self.folder("0/a.png", "0/b.png")
        (folder / "0" / "b.png").write_bytes(content)
        return folder

    def deep_image(self) -> Path:
        folder = self.folder("0/a.png")
        image = pytest.importorskip("PIL.Image")
        image.fromarray(np.full((8, 8), 3000, np.uint16)).save(folder / "0" / "a.png")
        return folder

    def cut_image(self) -> Path:
        folder = self.folder("0/a.png", "1/broken.png", size=(64, 64))
        whole = (folder / "1" / "broken.png").read_bytes()
        (folder / "1" / "broken.png").write_bytes(whole[: len(whole) // 2])
        return folder

    def other_model(self, classes: int = 10, image: tuple[int, int] = (8, 8), patch: int = 2) -> Path:
        """A small untrained checkpoint that takes other images or tells other classes apart."""
        block = BlockConfig(attention=False, soft_moe=SoftMoEConfig(8, 4, 1, 4))
        config = ViTConfig(image, (patch, patch), 1, classes, dim=8, num_heads=1, blocks=(block,))
        model = SoftMoEViT(config, details=moeprune.load(self.single).details)
        model.blocks[0].soft_moe.reset_parameters(torch.Generator().manual_seed(0))
        path = self.path(".safetensors")
        moeprune.save(model, path)
        return path

    def rewritten_npz(self, **changed: object) -> tuple[Path, Path]:
        """An analysis of a file that was changed afterwards, and the file."""
        data, analysis = self.npz(), self.path(".safetensors")
        assert self.run("analyze", self.single, "--data", data, "-o", analysis).code == 0
        np.savez(data, **self.arrays(**changed))
        return analysis, data

    def evaluating(self, data: object, *options: object) -> list[object]:
        return ["eval", self.single, "--data", data, *options]

    def words(self, text: str) -> list[object]:
        """The words of a command; those in capitals stand for paths, which are made where they are used."""
        paths: dict[str, Any] = {
            "SINGLE": self.single, "NEW": self.output, "ANALYSIS": self.analysis, "OUT": self.out,
            "OLD": lambda: existing(self), "LONG": self.out / ("x" * 300), "PRUNED": self.pruned,
            "MISSING": self.out / "missing" / "x.safetensors", "BELOW": lambda: existing(self) / "x",
            "FEWER": lambda: self.other_model(classes=7), "WIDE": lambda: self.other_model(image=(8, 16)),
            "SMALL": lambda: self.other_model(image=(4, 4), patch=1), "NPZ": self.npz,
            "DARK": lambda: self.with_metadata(preprocessing={"mean": [0.1]}),
            "MEANS": lambda: self.with_metadata(preprocessing={"mean": [0, 0]}),
        }  # fmt: skip
        found = [paths.get(word, word) for word in text.split()]
        return [word() if callable(word) else word for word in found]

    def pruning(self, *options: object, keep: object = "1/8", output: Path | None = None) -> list[object]:
        return ["prune", self.single, "--keep", keep, "-o", output or self.output, *options]

    def pruned(self) -> Path:
        path = self.path(".safetensors")
        assert self.run(*self.pruning("--scope", "input", output=path)).code == 0
        return path


@pytest.fixture
def workshop(tmp_path, single, small_analysis, run):
    return Workshop(tmp_path, single, small_analysis, run)


def check_refused(workshop: Workshop, words: list[object], fragments: tuple[str, ...]) -> str:
    """Run a command that must be refused; returns its stderr."""
    before = files_under(workshop.out)
    result = workshop.run(*words)
    assert result.code == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""
    for fragment in fragments:
        assert fragment in result.stderr
    assert files_under(workshop.out) == before
    assert not workshop.marker.exists()
    return result.stderr


# --- checkpoints -------------------------------------------------------------------------------

Make = Callable[[Workshop], Path]
UNREADABLE: dict[str, tuple[Make, str]] = {
    "missing": (lambda w: w.root / "none.safetensors", "none.safetensors"),
    "an impossible name": (lambda w: w.root / ("x" * 300), "xxx"),
    "empty": (lambda w: w.file(b""), "empty"),
    "random bytes": (lambda w: w.file(np.random.default_rng(0).bytes(5000)), "made1.safetensors"),
    "a pickle": (lambda w: w.file(pickle.dumps(Bomb(w.marker))), "made1.safetensors"),
    "a directory": (lambda w: w.out, "folder"),
    "trailing bytes": (lambda w: w.file(w.single.read_bytes() + b"\0"), "made1.safetensors"),
    "cut": (lambda w: w.file(w.single.read_bytes()[:9000]), "truncated"),
}
COMMANDS_ON: dict[str, Callable[[Workshop, Path], list[object]]] = {
    "inspect": lambda w, path: ["inspect", path],
    "analyze": lambda w, path: ["analyze", path, "--data", "digits", "-o", w.output],
    "prune": lambda w, path: ["prune", path, "--keep", "1/8", "--scope", "input", "-o", w.output],
    "prune with it as analysis": lambda w, path: w.pruning("--analysis", path),
    "eval": lambda w, path: ["eval", path, "--data", "digits"],
    "eval with it as baseline": lambda w, path: w.evaluating("digits", "--baseline", path),
}


@pytest.mark.parametrize("command", COMMANDS_ON)
@pytest.mark.parametrize(("make", "fragment"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_read(workshop, command, make, fragment):
    check_refused(workshop, COMMANDS_ON[command](workshop, make(workshop)), (fragment,))


ARCHITECTURE: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "another kind": ({"type": "cnn"}, ("`type`", "cnn")),
    "unknown key": ({"depth": 3}, ("depth",)),
    "missing block": ({"blocks": [None]}, ("blocks[0]",)),
    "blocks is a number": ({"blocks": 1}, ("`blocks`",)),
    "image of no patches": ({"image_size": [8, 7]}, ("`image_size`", "[8, 7]")),
    "patches of size 0": ({"patch_size": [0, 2]}, ("`patch_size[0]`",)),
    "heads": ({"num_heads": 3}, ("`num_heads` 3",)),
    "no classes": ({"num_classes": 0}, ("unexpected `head.weight`",)),
    "an odd eps": ({"norm_eps": "1e-6"}, ("`norm_eps`", "'1e-6'")),
    "no class token": ({"class_position": False}, ("`class_token` true",)),
    "other classes": ({"num_classes": 9}, ("`head.weight`", "[10, 32]", "[9, 32]")),
    "huge": ({"num_classes": 10**30}, ("made1.safetensors", "too large")),
    "too many digits to print": (
        {"in_channels": 10**4000, "patch_size": [10**4000, 2], "image_size": [10**4000, 8]}, ("too large",),
    ),
    "pooling": ({"pooling": "max"}, ("`pooling`", "max")),
    "token that is not there": ({"pooling": "token"}, ("`pooling`",)),
}  # fmt: skip
METADATA: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "a newer format": ({"format": 2}, ("format 2",)),
    "no architecture": ({"architecture": None}, ("architecture",)),
    "plan of a layer is null": ({"plan": {LAYER: None}}, (LAYER,)),
    "missing key in the plan": ({"plan": {LAYER: {"k": 2}}}, (LAYER, "scope")),
    "preprocessing": ({"preprocessing": {"crop": 8}}, ("preprocessing", "crop")),
    "deviation of 0": ({"preprocessing": {"std": [0]}}, ("preprocessing", "std")),
    "NaN": ({"preprocessing": {"mean": [float("nan")]}}, ("`moeprune`", "malformed")),
    "images resized beyond all bounds": ({"preprocessing": {"resize": 10**6}}, ("resize", "16384")),
    "infinite provenance": ({"provenance": {"training": [float("inf")]}}, ("`moeprune`", "malformed")),
    "provenance nested too deep": (
        {"provenance": {"a": json.loads("[" * 300 + "]" * 300)}}, ("`moeprune`", "nested"),
    ),
    "provenance that is no text": ({"provenance": {"a": "\ud800"}}, ("`moeprune`",)),
    "source is text": ({"source": "mine"}, ("source",)),
    "provenance is null": ({"provenance": None}, ("provenance",)),
}  # fmt: skip
PLANS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "other experts": ({"num_experts": 64}, (LAYER,)),
    "kept out of range": ({"kept": [3, 128]}, ("`kept`", "128")),
    "kept in no order": ({"kept": [5, 3]}, ("`kept`",)),
    "too many kept": ({"kept": [3, 4, 5]}, ("`kept`",)),
    "k above n": ({"scope": "input", "k": 129, "kept": None}, ("`k`", "129")),
    "kept without static": ({"scope": "batch"}, ("`kept`",)),
    "static without kept": ({"kept": None}, ("`kept`",)),
    "unknown compensation": ({"compensation": "sum"}, ("`compensation`", "sum")),
    "unknown key": ({"budget": 1}, ("budget",)),
    "of a dense file": ({}, (f"`{LAYER}.fc1_weight`", "[128, 32, 4]")),
}
NO_CHECKPOINT: dict[str, tuple[Make, tuple[str, ...]]] = {
    "no metadata": (lambda w: w.save(w.tensors(), None), ("made1.safetensors", "lost its metadata")),
    "metadata is no JSON": (lambda w: w.save(w.tensors(), "{format: 1}"), ("`moeprune`", "JSON")),
    "metadata is a list": (lambda w: w.save(w.tensors(), []), ("`moeprune`", "Expected `object`")),
    "an analysis": (lambda w: w.analysis, ("analysis",)),
    "kind is missing": (lambda w: w.save(w.tensors(), {"format": 1}), ("kind",)),
    "unknown key in a block": (lambda w: w.with_block(norm=True), ("blocks[0]", "norm")),
    "no Soft MoE": (lambda w: w.with_block(soft_moe=None, mlp_dim=4), ("no MoE layers",)),
    "MLP and Soft MoE": (lambda w: w.with_block(mlp_dim=4), ("`mlp_dim`", "`soft_moe`")),
    "residual is text": (lambda w: w.with_block(residual="no"), ("blocks[0].residual`",)),
    "unknown key in a Soft MoE": (lambda w: w.with_soft_moe(gate=1), ("soft_moe", "gate")),
    "another width": (lambda w: w.with_soft_moe(dim=16), ("width 16", "`dim` 32")),
    "other experts": (lambda w: w.with_soft_moe(num_experts=64), (f"`{LAYER}.phi`", "[32, 128, 1]")),
    "no experts": (lambda w: w.with_soft_moe(num_experts=0), ("soft_moe.num_experts`",)),
    "router": (lambda w: w.with_soft_moe(router_norm="l1"), ("soft_moe.router_norm`", "l1")),
    "plan of an unknown layer": (lambda w: w.with_plan("blocks.7.soft_moe"), ("blocks.7.soft_moe",)),
    "integers": (
        lambda w: w.with_tensors(head__bias=torch.arange(10), position=torch.ones(16, 32, dtype=torch.int8)),
        ("`head.bias`", "int64", "`position`", "int8"),
    ),
    "another precision": (
        lambda w: w.with_tensors(head__weight=torch.zeros(10, 32, dtype=torch.float64)),
        ("`head.weight`", "float64"),
    ),
    "8-bit floats": (
        lambda w: w.with_tensors(head__weight=torch.zeros(10, 32).to(torch.float8_e4m3fn)),
        ("`head.weight`", "float8"),
    ),
    **{name: (lambda w, c=c: w.with_architecture(**c), texts) for name, (c, texts) in ARCHITECTURE.items()},
    **{name: (lambda w, c=c: w.with_metadata(**c), texts) for name, (c, texts) in METADATA.items()},
    **{f"plan, {name}": (lambda w, c=c: w.with_plan(**c), (LAYER, *texts)) for name, (c, texts) in PLANS.items()},
}


@pytest.mark.parametrize("command", ["inspect", "eval"])
@pytest.mark.parametrize(("make", "fragments"), NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_checkpoints_that_are_none(workshop, command, make, fragments):
    check_refused(workshop, COMMANDS_ON[command](workshop, make(workshop)), fragments)


@pytest.mark.parametrize("command", [name for name in COMMANDS_ON if "analysis" not in name])
def test_all_missing_unexpected_and_misshapen_tensors_are_listed(workshop, command):
    path = workshop.with_tensors(
        head__bias=None,
        patch_embed__weight=None,
        head__gain=torch.ones(3),
        blocks__0__extra=torch.ones(1),
        head__weight=torch.ones(10, 31),
        position=torch.ones(1, 16, 32),
    )
    expected = (
        "missing `head.bias`", "missing `patch_embed.weight`", "unexpected `head.gain`",
        "unexpected `blocks.0.extra`", "`head.weight` is [10, 31], expected [10, 32]",
        "`position` is [1, 16, 32], expected [16, 32]", path.name,
    )  # fmt: skip
    check_refused(workshop, COMMANDS_ON[command](workshop, path), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("command", ["analyze", "prune", "eval", "eval with it as baseline"])
def test_weights_that_are_no_numbers_are_named(workshop, command, value):
    tensors = workshop.tensors()
    weight, phi = tensors["head.weight"].clone(), tensors[f"{LAYER}.phi"].clone()
    weight[3, 4] = value
    phi[0, 7, 0] = value
    path = workshop.with_tensors(head__weight=weight, blocks__0__soft_moe__phi=phi)
    fragments = ("`head.weight`", f"`{LAYER}.phi`", path.name)
    stderr = check_refused(workshop, COMMANDS_ON[command](workshop, path), fragments)
    assert "`head.bias`" not in stderr


def test_finite_weights_that_overflow(workshop):
    path = workshop.with_tensors(head__weight=torch.full((10, 32), 3e38))
    check_refused(workshop, ["eval", path, "--data", "digits", "--limit", 10], ("NaN or infinite", "digits"))
    path = workshop.with_tensors(blocks__0__soft_moe__fc2_weight=torch.full((128, 32, 4), 3e38))
    words = ["analyze", path, "--data", "digits", "--limit", 10, "-o", workshop.output]
    check_refused(workshop, words, ("NaN or infinite", f"`{LAYER}`"))


# --- analyses ----------------------------------------------------------------------------------

LSTSQ = ("--compensate", "lstsq")
ANALYSES: dict[str, tuple[Make, tuple[object, ...], tuple[str, ...]]] = {
    "a checkpoint": (lambda w: w.single, (), (".safetensors", "not an analysis")),
    "a newer format": (lambda w: w.analysis_with(format=2), (), ("format 2",)),
    "no layers": (lambda w: w.analysis_with(layers=[]), (), (LAYER,)),
    "an unknown layer": (lambda w: w.analysis_with(layers=["x"]), (), ("made1", "x.mean_mass")),
    "layers is a number": (lambda w: w.analysis_with(layers=3), (), ("made1.safetensors",)),
    "no origin": (lambda w: w.analysis_with(origin=None), (), ("made1.safetensors",)),
    "a fingerprint that is a number": (
        lambda w: w.analysis_of(fingerprint=3), (), ("fingerprint",),
    ),
    "samples that are text": (lambda w: w.analysis_of(samples="all"), LSTSQ, ("samples",)),
    "fewer samples than none": (lambda w: w.analysis_of(samples=-1), LSTSQ, ("samples",)),
    "data that is text": (
        lambda w: w.analysis_with(origin={"checkpoint": "", "data": "a", "moeprune": ""}), (), ("data`",),
    ),
    **{
        f"no {key} of its data": (lambda w, key=key: w.analysis_of(**{key: None}), LSTSQ, (key,))
        for key in ("spec", "samples", "fingerprint")
    },
    "a tensor is missing": (lambda w: w.analysis_tensor("gram", lambda t: None), (), (f"{LAYER}.gram",)),
    "too few experts": (
        lambda w: w.analysis_tensor("mean_mass", lambda t: t[:64]), (), (f"{LAYER}.term_mean",),
    ),
    "another width": (
        lambda w: w.analysis_tensor("term_mean", lambda t: t[..., :3]), (), (f"{LAYER}.term_mean",),
    ),
    "integers": (lambda w: w.analysis_tensor("deviation", lambda t: t.int()), (), (f"{LAYER}.deviation",)),
    "NaN": (lambda w: w.analysis_tensor("mean_mass", lambda t: t * float("nan")), (), (f"`{LAYER}.mean",)),
    "of other samples": (
        lambda w: w.rewritten_npz(inputs=w.arrays()["inputs"] / 2)[0], LSTSQ, ("made1.npz", "changed"),
    ),
    "of fewer samples": (
        lambda w: w.rewritten_npz(inputs=w.arrays()["inputs"][1:], labels=np.arange(SAMPLES - 1) % 10)[0],
        LSTSQ, ("made1.npz", "changed"),
    ),
    "of a file that is gone": (
        lambda w: [made := w.rewritten_npz(), made[1].unlink()][0][0], LSTSQ, ("made1.npz",),
    ),
    "of other data than is given": (
        lambda w: w.analysis, (*LSTSQ, "--data", "digits:train", "--limit", 60), ("digits:train",),
    ),
    "of another limit": (
        lambda w: w.analysis, (*LSTSQ, "--data", "digits", "--limit", 50), ("50 samples", "60 samples"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "fragments"), ANALYSES.values(), ids=ANALYSES)
def test_analyses(workshop, make, options, fragments):
    options = options or ("--compensate", "mean")
    check_refused(workshop, workshop.pruning("--analysis", make(workshop), *options), fragments)


def test_an_analysis_of_another_checkpoint(workshop):
    words = ["prune", workshop.other_model(), "--keep", "1/2", "-o", workshop.output]
    check_refused(workshop, [*words, "--analysis", workshop.analysis], ("analysis", "another checkpoint"))


# --- data --------------------------------------------------------------------------------------


def damaged(path: Path, start: int) -> Path:
    content = bytearray(path.read_bytes())
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


ARRAYS: dict[str, tuple[Callable[[Workshop], dict[str, object]], tuple[str, ...]]] = {
    "of another size": (lambda w: {"inputs": np.zeros((SAMPLES, 1, 9, 8), "f4")}, ("[12, 1, 9, 8]",)),
    "of one number": (lambda w: {"inputs": np.zeros((), "f4")}, ("[]", "[n, 1, 8, 8]")),
    "of integers": (lambda w: {"inputs": np.zeros((SAMPLES, 1, 8, 8), "i4")}, ("int32", "uint8")),
    "of nothing": (
        lambda w: {"inputs": np.zeros((0, 1, 8, 8), "f4"), "labels": np.zeros(0, "i8")}, ("no samples",),
    ),
    "of NaN": (lambda w: {"inputs": w.with_nan(7)}, ("sample 7", "NaN")),
    "of infinity": (lambda w: {"inputs": w.with_nan(9, float("-inf"))}, ("sample 9", "infinite")),
    "without labels": (lambda w: {"labels": None}, ("labels",)),
    "with a class too many": (lambda w: {"labels": np.arange(SAMPLES)}, ("sample 10", "label 10")),
    "with a label below 0": (lambda w: {"labels": np.arange(SAMPLES) - 1}, ("sample 0", "label -1")),
    "with labels that are floats": (lambda w: {"labels": np.zeros(SAMPLES)}, ("`labels`", "integers")),
    "with too few labels": (lambda w: {"labels": np.zeros(SAMPLES - 1, "i8")}, ("`labels`", "[11]", "[12]")),
    "with labels in a column": (lambda w: {"labels": np.zeros((SAMPLES, 1), "i8")}, ("`labels`", "[12, 1]")),
}  # fmt: skip
ARCHIVES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "a label above all integers": ({"labels": np.full(SAMPLES, 2**64 - 1, "u8")}, (str(2**64 - 1),)),
    "no array of inputs": ({"inputs": None}, ("`inputs`", "labels")),
    "inputs that are text": ({"inputs": np.full((SAMPLES, 1, 8, 8), "a")}, ("inputs", "made1.npz")),
    "inputs that are records": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), [("a", "f4")])}, ("inputs",)),
    "inputs that are complex": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), "c8")}, ("inputs", "complex64")),
    "Fortran order": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), "f4", order="F")}, ("made1.npz", "Fortran")),
}
DATA: dict[str, tuple[Callable[[Workshop], object], tuple[str, ...]]] = {
    "missing": (lambda w: w.root / "none.npz", ("none.npz",)),
    "an impossible name": (lambda w: "x" * 300, ("xxx",)),
    "unknown split": (lambda w: "digits:validation", ("`validation`", "calibration")),
    "another kind of file": (lambda w: w.file(b"1,2\n", ".csv"), ("made1.csv",)),
    "another model's data": (lambda w: "pairs", ("pairs", "[2000, 1, 8, 16]", "[n, 1, 8, 8]")),
    "random bytes as npz": (lambda w: w.file(b"\x93NUMPY" * 99, ".npz"), ("made1.npz",)),
    "random bytes as safetensors": (lambda w: w.file(b"abc" * 999), ("made1.safetensors",)),
    "a checkpoint": (lambda w: w.single, ("`inputs`", "single.safetensors")),
    **{
        f"{kind} {name}": (lambda w, kind=kind, make=make: getattr(w, kind)(**make(w)), fragments)
        for kind in ("npz", "safetensors")
        for name, (make, fragments) in ARRAYS.items()
    },
    **{name: (lambda w, arrays=arrays: w.npz(**arrays), texts) for name, (arrays, texts) in ARCHIVES.items()},
    **{
        f"an array that claims {shape}": (
            lambda w, shape=shape: w.claiming("inputs", "(12, 1", shape), ("`inputs`", "made1.npz", "bytes"),
        )
        for shape in ("(-1, 1", "(10000000000, 1", f"({2**70}, 1")
    },
    "labels that are cut": (lambda w: w.claiming("labels", "", "", cut=8), ("`labels`", "88 bytes")),
    "a header that is no literal": (
        lambda w: w.claiming("inputs", "(12, 1, 8, 8)", "(12, 1, 8, 8"), ("`inputs`", "made1.npz"),
    ),
    "an encrypted archive": (lambda w: w.encrypted(), ("made2.npz", "encrypted")),
    "inputs that are objects": (
        lambda w: w.npz(inputs=np.array([Bomb(w.marker)] * SAMPLES, dtype=object)), ("made1.npz", "object_"),
    ),
    "labels that are objects": (
        lambda w: w.npz(labels=np.array([Bomb(w.marker)] * SAMPLES, dtype=object)), ("made1.npz", "object_"),
    ),
    "a pickle as npz": (lambda w: w.file(pickle.dumps(Bomb(w.marker)), ".npz"), ("made1.npz",)),
    **{
        f"{kind} cut at {share}": (
            lambda w, kind=kind, share=share: cut(getattr(w, kind)(), share), ("made1.",),
        )
        for kind in ("npz", "compressed", "safetensors")
        for share in (0.01, 0.5, 0.99)
    },
    **{
        f"{kind} damaged at {start}": (
            lambda w, kind=kind, start=start: damaged(getattr(w, kind)(), start), ("made1.npz",),
        )
        for kind, starts in (("npz", (0, 60)), ("compressed", (60, 300, 1500)))
        for start in starts
    },
    "an empty folder": (lambda w: w.folder(), ("no images", "made1")),
    "empty class folders": (lambda w: w.folder("0/!a.txt"), ("no images", "made1", "10")),
    "images without class folders": (lambda w: w.flat_folder(), ("made1", "no labels")),
    "fewer class folders than classes": (
        lambda w: [made := w.folder(), (made / "0").mkdir(), (made / "1").mkdir()][0],
        ("2 class folders", "made1", "10 classes"),
    ),
    "more class folders than classes": (
        lambda w: w.folder("11/a.png", "12/a.png"), ("12 class folders", "10 classes"),
    ),
    "an image of another kind": (
        lambda w: w.folder_with(b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("b.png", "not a readable image"),
    ),
    "an image of 16 bits": (lambda w: w.deep_image(), ("a.png", "8 bits")),
    "only files of other kinds": (lambda w: w.folder("0/!a.txt", "0/!b.gif"), ("no images",)),
    "a file that is no image": (lambda w: w.folder("0/a.png", "1/!b.png"), ("b.png",)),
    "an image cut off": (lambda w: w.cut_image(), ("broken.png",)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "fragments"), DATA.values(), ids=DATA)
def test_data(workshop, make, fragments):
    check_refused(workshop, workshop.evaluating(make(workshop)), fragments)


def test_images_too_small(workshop):
    words = workshop.evaluating(workshop.folder("0/a.png", size=(20, 30)), "--preprocess", "resize=6")
    check_refused(workshop, words, ("a.png", "resize", "6×9"))


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda w: w.npz(inputs=w.with_nan(7)), ("sample 7", "NaN")),
        (lambda w: w.npz(labels=np.arange(SAMPLES)), ("sample 10", "label 10")),
        (lambda w: w.compressed(inputs=w.with_nan(11)), ("sample 11", "NaN")),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_analyze_names_the_bad_sample_whatever_its_batch(workshop, make, fragments, batch_size):
    words = ["analyze", workshop.single, "--data", make(workshop), "-o", workshop.output]
    check_refused(workshop, [*words, "--batch-size", batch_size], fragments)


def test_a_bad_sample_is_named_by_its_place_in_the_file(workshop):
    data = workshop.npz(inputs=workshop.with_nan(8))
    results = [workshop.run(*workshop.evaluating(data, "--limit", SAMPLES - left)) for left in (1, 2, 3)]
    refused = [result for result in results if result.code == 2]
    assert refused
    assert all("sample 8 " in result.stderr for result in refused)


# --- options -----------------------------------------------------------------------------------

EVAL = "eval SINGLE --data digits"
PRUNE = "prune SINGLE --keep 1/8 -o NEW"
SWEEP = f"{EVAL} --limit 10 --analysis ANALYSIS --sweep 1/8"
OPTIONS = {
    f"{EVAL} --max-accuracy-drop 0.5": ("--max-accuracy-drop", "--baseline"),
    f"{EVAL} --min-flops-reduction 0.5": ("--min-flops-reduction", "--baseline"),
    f"{EVAL} --min-size-reduction 0.5": ("--min-size-reduction", "--baseline"),
    f"{EVAL} --min-agreement 0.5": ("--min-agreement", "--baseline"),
    f"{EVAL} --baseline FEWER": ("baseline", "10", "7"),
    f"{EVAL} --baseline WIDE": ("baseline", "16"),
    f"{EVAL} --baseline SMALL": ("baseline", "4"),
    f"{EVAL} --baseline DARK": ("baseline", "mean"),
    f"{SWEEP} --baseline SINGLE": ("--sweep", "--baseline"),
    f"{SWEEP} --min-accuracy 1": ("--min-accuracy", "--sweep"),
    f"{EVAL} --sweep 1/8": ("--sweep", "--analysis"),
    "eval PRUNED --data digits --sweep 1/8 --analysis ANALYSIS": ("pruned",),
    f"{EVAL} --scope static": ("--scope", "--sweep"),
    f"{EVAL} --signal combine": ("--signal", "--sweep"),
    f"{EVAL} --compensate mean": ("--compensate", "--sweep"),
    PRUNE: ("--analysis", "--data"),
    f"{PRUNE} --scope input --signal deviation": ("deviation", "--analysis"),
    f"{PRUNE} --scope batch --compensate mean": ("mean",),
    f"{PRUNE} --scope input --compensate lstsq": ("lstsq", "--analysis", "--data"),
    f"{PRUNE} --analysis ANALYSIS --data digits:train": ("digits:train", "not the data of the analysis"),
    f"{PRUNE} --analysis ANALYSIS --limit 9": ("--limit",),
    "eval SINGLE --data digits:train --split test": ("--split test", "digits"),
    "eval SINGLE --data NPZ --split test": ("--split test",),
    f"{EVAL} --preprocess mean=0.1,0.2": ("mean", "2 values", "1 channels"),
    "eval MEANS --data digits": ("mean", "2 values", "1 channels"),
    "analyze PRUNED --data digits -o NEW": (f"`{LAYER}`", "pruned"),
}


@pytest.mark.parametrize(("text", "fragments"), OPTIONS.items())
def test_options(workshop, text, fragments):
    check_refused(workshop, workshop.words(text), fragments)


@pytest.mark.parametrize("words", [["prune"], ["prune", "x"], ["eval", "x"], ["analyze", "x", "-o", "y"], ["fit"]])
def test_calls_that_lack_something(run, words):
    result = run(*words)
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


# --- outputs -----------------------------------------------------------------------------------


def existing(workshop: Workshop) -> Path:
    path = workshop.out / "old.safetensors"
    path.write_bytes(b"keep me")
    return path


WRITERS = (
    "analyze SINGLE --data digits --limit 9 -o", "prune SINGLE --keep 1/8 --scope input -o",
    "inspect SINGLE --output-file",
)  # fmt: skip
PLACES = {
    "OLD": ("old.safetensors", "--force"),
    "OUT": ("out", "directory"),
    "MISSING": ("missing",),
    "BELOW": ("old.safetensors",),
    "LONG": ("xxx",),
}
OUTPUTS = {
    **{f"{writer} {place}": fragments for writer in WRITERS for place, fragments in PLACES.items()},
    f"{PRUNE} --scope input --output-file NEW": ("--output-file",),
    "prune SINGLE --keep 1/8 -o OLD --force --output-file OLD": ("old.safetensors", "--output-file"),
    "demo -o OLD": ("old.safetensors", "directory"),
    "demo -o BELOW": ("old.safetensors",),
    "demo -o OUT --output-file OLD": ("--force",),
}


@pytest.mark.parametrize(("text", "fragments"), OUTPUTS.items())
def test_outputs(workshop, text, fragments):
    check_refused(workshop, workshop.words(text), fragments)


def test_a_file_that_is_refused_later_leaves_the_old_output_alone(workshop):
    old = existing(workshop)
    data = workshop.npz(inputs=workshop.with_nan(7))
    words = ["analyze", workshop.single, "--data", data, "-o", old, "--force"]
    check_refused(workshop, words, ("sample 7",))
    assert old.read_bytes() == b"keep me"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_force_replaces_files_only(workshop):
    """`--force -o /dev/null` must not put a file in the place of the device."""
    pipe = workshop.out / "pipe"
    os.mkfifo(pipe)
    for words in (
        workshop.pruning("--scope", "input", "--force", output=pipe),
        ["inspect", workshop.single, "--force", "--output-file", pipe],
    ):
        result = workshop.run(*words)
        assert pipe.is_fifo()
        assert result.code == 2
        assert "pipe" in result.stderr
        assert "Traceback" not in result.stderr
    assert [path.name for path in workshop.out.iterdir()] == ["pipe"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user can write anywhere")
def test_a_directory_that_cannot_be_written(workshop):
    workshop.out.chmod(0o555)
    try:
        for writer in WRITERS:
            check_refused(workshop, workshop.words(f"{writer} NEW"), ("out", "permission"))
    finally:
        workshop.out.chmod(0o755)


def test_the_workshop_makes_good_files_where_nothing_is_changed(workshop):
    """Else the tests above might be refused for another reason than the one they name."""
    words = [
        workshop.evaluating(workshop.npz()),
        workshop.evaluating(workshop.compressed()),
        workshop.evaluating(workshop.safetensors()),
        workshop.evaluating(workshop.folder("0/a.png", "1/b.png")),
        workshop.evaluating("digits", "--limit", 9, "--baseline", workshop.with_tensors()),
        ["eval", workshop.with_architecture(), "--data", "digits", "--limit", 9],
        ["inspect", workshop.with_soft_moe()],
        ["inspect", workshop.with_metadata(plan={})],
        workshop.evaluating("digits", "--limit", 9, "--baseline", workshop.other_model()),
        workshop.pruning("--analysis", workshop.analysis_with()),
        workshop.pruning(
            "--analysis", workshop.rewritten_npz()[0], "--compensate", "lstsq", "--force"
        ),
    ]  # fmt: skip
    for call in words:
        result = workshop.run(*call)
        assert result.code == 0, (call, result.stderr)


def test_a_plan_that_fits_is_read(workshop):
    """The plan that the cases above break, on a checkpoint with the tensors it asks for."""
    tensors = workshop.tensors()
    order = [3, 5, *(expert for expert in range(128) if expert not in (3, 5))]
    tensors[f"{LAYER}.phi"] = tensors[f"{LAYER}.phi"][:, order].contiguous()
    for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"):
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"][[3, 5]].contiguous()
    path = workshop.save(tensors, {**workshop.metadata(), "plan": {LAYER: PLAN}})
    result = workshop.run("eval", path, "--data", "digits", "--limit", 9)
    assert result.code == 0, result.stderr
