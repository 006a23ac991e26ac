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
    "scope": "static",
    "k": 2,
    "num_experts": 128,
    "signal": "combine",
    "compensation": "none",
    "kept": [3, 5],
}


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

    def header(self, text: bytes, length: int | None = None) -> Path:
        """A safetensors file of this header."""
        return self.file((len(text) if length is None else length).to_bytes(8, "little") + text)

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

    def analysis_with(self, provenance: Mapping[str, Any] | None = None, **changed: object) -> Path:
        """The analysis with other metadata, or other keys in a part of its provenance."""
        metadata = self.metadata(self.analysis)
        for part, values in (provenance or {}).items():
            metadata["provenance"][part] |= values
        return self.save(self.tensors(self.analysis), {**metadata, **changed})

    def analysis_without(self, part: str, key: str) -> Path:
        metadata = self.metadata(self.analysis)
        del metadata["provenance"][part][key]
        return self.save(self.tensors(self.analysis), metadata)

    def analysis_with_tensor(self, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
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

    def pruning(self, *options: object, keep: object = "1/8", output: Path | None = None) -> list[object]:
        return ["prune", self.single, "--keep", keep, "-o", output or self.output, *options]

    def with_analysis(self, analysis: Path, *options: object) -> list[object]:
        return self.pruning("--analysis", analysis, "--compensate", "mean", *options)

    def sweeping(self, *options: object) -> list[object]:
        return self.evaluating("digits", "--limit", 10, "--analysis", self.analysis, "--sweep", *options)


@pytest.fixture
def workshop(tmp_path, single, small_analysis, run):
    return Workshop(tmp_path, single, small_analysis, run)


Build = Callable[[Workshop], list[object]]
Case = tuple[str, Build, tuple[str, ...]]
"""A name, how to make the command line, and what the error must name."""


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


def table(cases: list[Case]) -> pytest.MarkDecorator:
    values = [(build, fragments) for _, build, fragments in cases]
    return pytest.mark.parametrize(("build", "fragments"), values, ids=[name for name, _, _ in cases])


# --- checkpoints -------------------------------------------------------------------------------

UNREADABLE: list[tuple[str, Callable[[Workshop], Path], tuple[str, ...]]] = [
    ("missing", lambda w: w.root / "none.safetensors", ("none.safetensors",)),
    ("an impossible name", lambda w: w.root / ("x" * 300), ("xxx",)),
    ("empty", lambda w: w.file(b""), ("made1.safetensors", "empty")),
    ("random bytes", lambda w: w.file(np.random.default_rng(0).bytes(5000)), ("made1.safetensors",)),
    ("text", lambda w: w.file(b"# a model\n" * 100), ("made1.safetensors",)),
    ("a pickle", lambda w: w.file(pickle.dumps(Bomb(w.marker))), ("made1.safetensors",)),
    ("a directory", lambda w: w.out, ("out", "folder")),
    ("a deep header", lambda w: w.header(b"[" * 100_000), ("made1.safetensors", "truncated")),
    ("an endless header", lambda w: w.header(b"{}", 2**64 - 1), ("made1.safetensors", "truncated")),
    (
        "a size beyond those of torch",
        lambda w: w.header(
            b'{"x": {"dtype": "F32", "shape": [0, 9223372036854775808], "data_offsets": [0, 0]}}'
        ),
        ("made1.safetensors", "truncated"),
    ),
    ("trailing bytes", lambda w: w.file(w.single.read_bytes() + b"\0"), ("made1.safetensors",)),
    *(
        (
            f"cut at {name}",
            lambda w, cut=cut: w.file(w.single.read_bytes()[: cut(w.single.stat().st_size)]),
            ("made1.safetensors", "truncated"),
        )
        for name, cut in {
            "1 byte": lambda size: 1,
            "8 bytes": lambda size: 8,
            "100 bytes": lambda size: 100,
            "half": lambda size: size // 2,
            "all but 1 byte": lambda size: size - 1,
        }.items()
    ),
]
COMMANDS_ON: dict[str, Callable[[Workshop, Path], list[object]]] = {
    "inspect": lambda w, path: ["inspect", path],
    "analyze": lambda w, path: ["analyze", path, "--data", "digits", "-o", w.output],
    "prune": lambda w, path: ["prune", path, "--keep", "1/8", "--scope", "input", "-o", w.output],
    "prune with it as analysis": lambda w, path: w.with_analysis(path),
    "eval": lambda w, path: ["eval", path, "--data", "digits"],
    "eval with it as baseline": lambda w, path: w.evaluating("digits", "--baseline", path),
}


@pytest.mark.parametrize("command", COMMANDS_ON)
@pytest.mark.parametrize(
    ("make", "fragments"), [case[1:] for case in UNREADABLE], ids=[case[0] for case in UNREADABLE]
)
def test_files_that_cannot_be_read(workshop, command, make, fragments):
    check_refused(workshop, COMMANDS_ON[command](workshop, make(workshop)), fragments)


NO_CHECKPOINT: list[tuple[str, Callable[[Workshop], Path], tuple[str, ...]]] = [
    ("no metadata", lambda w: w.save(w.tensors(), None), ("made1.safetensors", "lost its metadata")),
    ("metadata is no JSON", lambda w: w.save(w.tensors(), "{format: 1}"), ("`moeprune`", "JSON")),
    ("metadata is a list", lambda w: w.save(w.tensors(), []), ("`moeprune`", "Expected `object`")),
    ("an analysis", lambda w: w.analysis, ("analysis",)),
    ("kind is missing", lambda w: w.save(w.tensors(), {"format": 1}), ("kind",)),
    ("a newer format", lambda w: w.with_metadata(format=2), ("format 2",)),
    ("format is text", lambda w: w.with_metadata(format="1"), ("format '1'",)),
    ("no architecture", lambda w: w.with_metadata(architecture=None), ("architecture",)),
    ("another architecture", lambda w: w.with_architecture(type="cnn"), ("`type`", "cnn")),
    ("unknown key", lambda w: w.with_architecture(depth=3), ("depth",)),
    ("unknown key in a block", lambda w: w.with_block(norm=True), ("blocks[0]", "norm")),
    ("unknown key in a Soft MoE", lambda w: w.with_soft_moe(gate=1), ("soft_moe", "gate")),
    (
        "missing key",
        lambda w: w.with_metadata(
            architecture={k: v for k, v in w.metadata()["architecture"].items() if k != "num_heads"}
        ),
        ("architecture", "num_heads"),
    ),
    ("missing block", lambda w: w.with_architecture(blocks=[None]), ("blocks[0]",)),
    ("blocks is a number", lambda w: w.with_architecture(blocks=1), ("`blocks`",)),
    ("no Soft MoE", lambda w: w.with_block(soft_moe=None, mlp_dim=4), ("no Soft MoE layers",)),
    ("MLP and Soft MoE", lambda w: w.with_block(mlp_dim=4), ("blocks[0]", "`mlp_dim`")),
    ("image of no patches", lambda w: w.with_architecture(image_size=[8, 7]), ("`image_size`", "[8, 7]")),
    ("image size is one number", lambda w: w.with_architecture(image_size=8), ("`image_size`",)),
    ("patches of size 0", lambda w: w.with_architecture(patch_size=[0, 2]), ("`patch_size`",)),
    ("heads", lambda w: w.with_architecture(num_heads=3), ("`num_heads` 3",)),
    ("half a head", lambda w: w.with_architecture(num_heads=0.5), ("`num_heads`", "0.5")),
    ("no classes", lambda w: w.with_architecture(num_classes=0), ("unexpected `head.weight`",)),
    ("fewer than none", lambda w: w.with_architecture(num_classes=-1), ("`num_classes`",)),
    ("an odd eps", lambda w: w.with_architecture(norm_eps="1e-6"), ("`norm_eps` is '1e-6'",)),
    ("no flag", lambda w: w.with_architecture(layer_scale=1), ("`layer_scale` is 1",)),
    ("no class token", lambda w: w.with_architecture(class_position=False), ("`class_token` true",)),
    ("other classes", lambda w: w.with_architecture(num_classes=9), ("`head.weight`", "[10, 32]", "[9, 32]")),
    ("huge", lambda w: w.with_architecture(num_classes=10**30), ("made1.safetensors", "no model")),
    (
        "too many digits to print",
        lambda w: w.with_architecture(
            in_channels=10**4000, patch_size=[10**4000, 2], image_size=[10**4000, 8]
        ),
        ("made1.safetensors", "no model"),
    ),
    ("class token is text", lambda w: w.with_architecture(class_token="yes"), ("`class_token`",)),
    ("final norm is text", lambda w: w.with_architecture(final_norm=""), ("`final_norm`",)),
    ("residual is text", lambda w: w.with_block(residual="no"), ("`residual`",)),
    ("pooling", lambda w: w.with_architecture(pooling="max"), ("`pooling`", "max")),
    ("token that is not there", lambda w: w.with_architecture(pooling="token"), ("`pooling`",)),
    ("another width", lambda w: w.with_soft_moe(dim=16), ("`dim` 16", "`dim` 32")),
    ("other experts", lambda w: w.with_soft_moe(num_experts=64), (f"`{LAYER}.phi`", "[32, 128, 1]")),
    ("no experts", lambda w: w.with_soft_moe(num_experts=0), ("`num_experts`",)),
    ("router", lambda w: w.with_soft_moe(router_norm="l1"), ("`router_norm`", "l1")),
    ("plan is a list", lambda w: w.with_metadata(plan=[]), ("plan",)),
    ("plan of a layer is null", lambda w: w.with_metadata(plan={LAYER: None}), (LAYER,)),
    ("plan of an unknown layer", lambda w: w.with_plan("blocks.7.soft_moe"), ("blocks.7.soft_moe",)),
    ("plan of other experts", lambda w: w.with_plan(num_experts=64), (LAYER,)),
    ("kept out of range", lambda w: w.with_plan(kept=[3, 128]), (LAYER, "`kept`", "128")),
    ("kept below 0", lambda w: w.with_plan(kept=[-1, 3]), (LAYER, "`kept[0]`", "-1")),
    ("kept twice", lambda w: w.with_plan(kept=[3, 3]), (LAYER, "`kept`")),
    ("kept in no order", lambda w: w.with_plan(kept=[5, 3]), (LAYER, "`kept`")),
    ("kept is a number", lambda w: w.with_plan(kept=3), (LAYER,)),
    ("too many kept", lambda w: w.with_plan(kept=[3, 4, 5]), (LAYER, "`kept`")),
    ("k above n", lambda w: w.with_plan(scope="input", k=129, kept=None), (LAYER, "`k`", "129")),
    ("k is text", lambda w: w.with_plan(k="2"), (LAYER, "`k`")),
    ("kept without static", lambda w: w.with_plan(scope="batch"), (LAYER, "`kept`")),
    ("static without kept", lambda w: w.with_plan(kept=None), (LAYER, "`kept`")),
    ("unknown scope", lambda w: w.with_plan(scope="token"), (LAYER, "`scope`", "token")),
    ("unknown signal", lambda w: w.with_plan(signal="norm"), (LAYER, "`signal`", "norm")),
    ("unknown compensation", lambda w: w.with_plan(compensation="sum"), (LAYER, "`compensation`", "sum")),
    ("unknown key in the plan", lambda w: w.with_plan(budget=1), (LAYER, "budget")),
    ("missing key in the plan", lambda w: w.with_metadata(plan={LAYER: {"k": 2}}), (LAYER, "scope")),
    ("plan of a dense file", lambda w: w.with_plan(), (f"`{LAYER}.fc1_weight`", "[128, 32, 4]")),
    ("preprocessing", lambda w: w.with_metadata(preprocessing={"crop": 8}), ("preprocessing", "crop")),
    ("preprocessing is text", lambda w: w.with_metadata(preprocessing="none"), ("preprocessing",)),
    ("deviation of 0", lambda w: w.with_metadata(preprocessing={"std": [0]}), ("preprocessing", "std")),
    ("mean is text", lambda w: w.with_metadata(preprocessing={"mean": "0"}), ("preprocessing", "mean")),
    ("NaN", lambda w: w.with_metadata(preprocessing={"mean": [float("nan")]}), ("`moeprune`", "malformed")),
    ("images resized beyond all bounds", lambda w: w.with_metadata(
        preprocessing={"resize": 10**6}
    ), ("preprocessing", "resize", "16384")),
    ("infinite provenance", lambda w: w.with_metadata(
        provenance={"training": [float("inf")]}
    ), ("`moeprune`", "malformed")),
    ("provenance nested too deep", lambda w: w.with_metadata(
        provenance={"a": json.loads("[" * 300 + "]" * 300)}
    ), ("`moeprune`", "nested")),
    ("provenance that is no text", lambda w: w.with_metadata(
        provenance={"a": "\ud800"}
    ), ("`moeprune`",)),
    ("source is text", lambda w: w.with_metadata(source="mine"), ("source",)),
    ("provenance is null", lambda w: w.with_metadata(provenance=None), ("provenance",)),
    (
        "integers",
        lambda w: w.with_tensors(head__bias=torch.arange(10), position=torch.ones(16, 32, dtype=torch.int8)),
        ("`head.bias`", "int64", "`position`", "int8"),
    ),
    (
        "one tensor of another precision",
        lambda w: w.with_tensors(head__weight=torch.zeros(10, 32, dtype=torch.float64)),
        ("`head.weight`", "float64"),
    ),
    (
        "8-bit floats",
        lambda w: w.with_tensors(head__weight=torch.zeros(10, 32).to(torch.float8_e4m3fn)),
        ("`head.weight`", "float8"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "eval"])
@pytest.mark.parametrize(
    ("make", "fragments"), [case[1:] for case in NO_CHECKPOINT], ids=[case[0] for case in NO_CHECKPOINT]
)
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

ANALYSES: list[Case] = [
    ("a checkpoint", lambda w: w.with_analysis(w.single), (".safetensors", "no analysis")),
    ("another checkpoint's", lambda w: [
        "prune", w.other_model(), "--keep", "1/2", "-o", w.output, "--analysis", w.analysis,
    ], ("analysis", "another checkpoint")),
    ("a newer format", lambda w: w.with_analysis(w.analysis_with(format=2)), ("format 2",)),
    ("no layers", lambda w: w.with_analysis(w.analysis_with(layers=[])), (LAYER,)),
    ("an unknown layer", lambda w: w.with_analysis(w.analysis_with(layers=["x"])), ("made1", "x.mean_mass")),
    ("layers is a number", lambda w: w.with_analysis(w.analysis_with(layers=3)), ("made1.safetensors",)),
    ("no provenance", lambda w: w.with_analysis(
        w.save(w.tensors(w.analysis), {**w.metadata(w.analysis), "provenance": None})
    ), ("made1.safetensors",)),
    ("a fingerprint that is a number", lambda w: w.with_analysis(
        w.analysis_with({"checkpoint": {"fingerprint": 3}})
    ), ("fingerprint",)),
    ("samples that are text", lambda w: w.with_analysis(
        w.analysis_with({"data": {"samples": "all"}}), "--compensate", "lstsq"
    ), ("samples",)),
    ("fewer samples than none", lambda w: w.with_analysis(
        w.analysis_with({"data": {"samples": -1}}), "--compensate", "lstsq"
    ), ("samples",)),
    ("data that is text", lambda w: w.with_analysis(
        w.save(
            w.tensors(w.analysis), w.metadata(w.analysis) | {"provenance": {"checkpoint": {}, "data": "a"}}
        )
    ), ("`data`", "no object")),
    *(
        (f"no {key} of its data", lambda w, key=key: w.with_analysis(
            w.analysis_without("data", key), "--compensate", "lstsq"
        ), (key,))
        for key in ("spec", "samples", "fingerprint")
    ),
    ("a tensor is missing", lambda w: w.with_analysis(
        w.analysis_with_tensor("gram", lambda t: None)
    ), (f"{LAYER}.gram",)),
    ("too few experts", lambda w: w.with_analysis(
        w.analysis_with_tensor("mean_mass", lambda t: t[:64])
    ), (f"{LAYER}.mean_mass",)),
    ("another width", lambda w: w.with_analysis(
        w.analysis_with_tensor("term_mean", lambda t: t[..., :3])
    ), (f"{LAYER}.term_mean",)),
    ("integers", lambda w: w.with_analysis(
        w.analysis_with_tensor("deviation", lambda t: t.int())
    ), (f"{LAYER}.deviation",)),
    ("NaN", lambda w: w.with_analysis(
        w.analysis_with_tensor("mean_mass", lambda t: t * float("nan"))
    ), (f"`{LAYER}.mean_mass`",)),
    ("of a file that has other samples now", lambda w: w.pruning(
        "--compensate", "lstsq", "--analysis", w.rewritten_npz(inputs=w.arrays()["inputs"] / 2)[0]
    ), ("made1.npz", "changed")),
    ("of a file that has fewer samples now", lambda w: w.pruning(
        "--compensate", "lstsq",
        "--analysis", w.rewritten_npz(inputs=w.arrays()["inputs"][1:], labels=np.arange(SAMPLES - 1) % 10)[0],
    ), ("made1.npz", "changed")),
    ("of a file that is gone", lambda w: [
        (made := w.rewritten_npz())[1].unlink(),
        *w.pruning("--compensate", "lstsq", "--analysis", made[0]),
    ][1:], ("made1.npz",)),
    ("of other data than is given", lambda w: w.pruning(
        "--compensate", "lstsq", "--analysis", w.analysis, "--data", "digits:train", "--limit", 60
    ), ("digits:train", "digits:calibration")),
    ("of another limit", lambda w: w.pruning(
        "--compensate", "lstsq", "--analysis", w.analysis, "--data", "digits", "--limit", 50
    ), ("50 samples", "60 samples")),
]  # fmt: skip


@table(ANALYSES)
def test_analyses(workshop, build, fragments):
    check_refused(workshop, build(workshop), fragments)


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


DATA: list[Case] = [
    ("missing", lambda w: w.evaluating(w.root / "none.npz"), ("none.npz",)),
    ("an impossible name", lambda w: w.evaluating("x" * 300), ("xxx",)),
    ("unknown", lambda w: w.evaluating("mnist"), ("`mnist`",)),
    ("unknown split", lambda w: w.evaluating("digits:validation"), ("`validation`", "calibration")),
    ("unknown split option", lambda w: w.evaluating("digits", "--split", "all"), ("all", "calibration")),
    ("split of a file", lambda w: w.evaluating(w.npz(), "--split", "tset"), ("split", "tset")),
    ("another kind of file", lambda w: w.evaluating(w.file(b"1,2\n", ".csv")), ("made1.csv",)),
    ("another model's data", lambda w: w.evaluating("pairs"), ("pairs", "[2000, 1, 8, 16]", "[n, 1, 8, 8]")),
    ("random bytes as npz", lambda w: w.evaluating(w.file(b"\x93NUMPY" * 99, ".npz")), ("made1.npz",)),
    ("empty npz file", lambda w: w.evaluating(w.file(b"", ".npz")), ("made1.npz",)),
    ("random bytes as safetensors", lambda w: w.evaluating(w.file(b"abc" * 999)), ("made1.safetensors",)),
    ("empty safetensors file", lambda w: w.evaluating(w.file(b"")), ("made1.safetensors",)),
    ("no array of inputs in npz", lambda w: w.evaluating(w.npz(inputs=None)), ("`inputs`", "labels")),
    ("a checkpoint", lambda w: w.evaluating(w.single), ("`inputs`", "single.safetensors")),
    *(
        (f"{kind} {name}", lambda w, kind=kind, make=make: w.evaluating(
            getattr(w, kind)(**make(w))
        ), fragments)
        for kind in ("npz", "safetensors")
        for name, make, fragments in (
            ("of another size", lambda w: {"inputs": np.zeros((SAMPLES, 1, 9, 8), "f4")}, ("[12, 1, 9, 8]",)),
            ("of colour", lambda w: {"inputs": np.zeros((SAMPLES, 3, 8, 8), "f4")}, ("[12, 3, 8, 8]",)),
            ("of flat rows", lambda w: {"inputs": np.zeros((SAMPLES, 64), "f4")}, ("[12, 64]",)),
            ("of one number", lambda w: {"inputs": np.zeros((), "f4")}, ("[]", "[n, 1, 8, 8]")),
            ("of integers", lambda w: {"inputs": np.zeros((SAMPLES, 1, 8, 8), "i4")}, ("int32", "uint8")),
            ("of nothing", lambda w: {
                "inputs": np.zeros((0, 1, 8, 8), "f4"), "labels": np.zeros(0, "i8"),
            }, ("no samples",)),
            ("of NaN", lambda w: {"inputs": w.with_nan(7)}, ("sample 7", "NaN")),
            ("of infinity", lambda w: {"inputs": w.with_nan(9, float("-inf"))}, ("sample 9", "infinite")),
            ("without labels", lambda w: {"labels": None}, ("labels",)),
            ("with a class too many", lambda w: {"labels": np.arange(SAMPLES)}, ("sample 10", "label 10")),
            ("with a label below 0", lambda w: {"labels": np.arange(SAMPLES) - 1}, ("sample 0", "label -1")),
            ("with labels that are floats", lambda w: {
                "labels": np.zeros(SAMPLES)
            }, ("`labels`", "integers")),
            ("with labels that are truth values", lambda w: {
                "labels": np.zeros(SAMPLES, bool)
            }, ("`labels`", "integers")),
            ("with too few labels", lambda w: {
                "labels": np.zeros(SAMPLES - 1, "i8")
            }, ("`labels`", "[11]", "[12]")),
            ("with labels in a column", lambda w: {
                "labels": np.zeros((SAMPLES, 1), "i8")
            }, ("`labels`", "[12, 1]")),
        )
    ),
    ("a label above all integers", lambda w: w.evaluating(
        w.npz(labels=np.full(SAMPLES, 2**64 - 1, "u8"))
    ), ("label", str(2**64 - 1))),
    *(
        (f"an array that claims {shape}", lambda w, shape=shape: w.evaluating(
            w.claiming("inputs", "(12, 1", shape)
        ), ("`inputs`", "made1.npz", "bytes"))
        for shape in ("(-1, 1", "(10000000000, 1", f"({2**70}, 1")
    ),
    ("labels that are cut", lambda w: w.evaluating(
        w.claiming("labels", "", "", cut=8)
    ), ("`labels`", "88 bytes")),
    ("a header that is no literal", lambda w: w.evaluating(
        w.claiming("inputs", "(12, 1, 8, 8)", "(12, 1, 8, 8")
    ), ("`inputs`", "made1.npz")),
    ("an encrypted archive", lambda w: w.evaluating(w.encrypted()), ("made2.npz", "encrypted")),
    ("inputs that are text", lambda w: w.evaluating(
        w.npz(inputs=np.full((SAMPLES, 1, 8, 8), "a"))
    ), ("inputs", "made1.npz")),
    ("inputs that are dates", lambda w: w.evaluating(
        w.npz(inputs=np.zeros((SAMPLES, 1, 8, 8), "M8[s]"))
    ), ("inputs", "made1.npz")),
    ("inputs that are records", lambda w: w.evaluating(
        w.npz(inputs=np.zeros((SAMPLES, 1, 8, 8), [("a", "f4")]))
    ), ("inputs", "made1.npz")),
    ("inputs that are complex", lambda w: w.evaluating(
        w.npz(inputs=np.zeros((SAMPLES, 1, 8, 8), "c8"))
    ), ("inputs", "complex64")),
    ("labels that are text", lambda w: w.evaluating(w.npz(labels=np.full(SAMPLES, "7"))), ("`labels`",)),
    ("inputs that are objects", lambda w: w.evaluating(
        w.npz(inputs=np.array([Bomb(w.marker)] * SAMPLES, dtype=object))
    ), ("made1.npz", "object_")),
    ("labels that are objects", lambda w: w.evaluating(
        w.npz(labels=np.array([Bomb(w.marker)] * SAMPLES, dtype=object))
    ), ("made1.npz", "object_")),
    ("a pickle as npz", lambda w: w.evaluating(w.file(pickle.dumps(Bomb(w.marker)), ".npz")), ("made1.npz",)),
    ("Fortran order", lambda w: w.evaluating(
        w.npz(inputs=np.asfortranarray(w.arrays()["inputs"]))
    ), ("made1.npz", "Fortran")),
    *(
        (f"{kind} cut at {share}", lambda w, kind=kind, share=share: w.evaluating(
            cut(getattr(w, kind)(), share)
        ), ("made1.",))
        for kind in ("npz", "compressed", "safetensors")
        for share in (0.01, 0.5, 0.99)
    ),
    *(
        (f"{kind} damaged at {start}", lambda w, kind=kind, start=start: w.evaluating(
            damaged(getattr(w, kind)(), start)
        ), ("made1.npz",))
        for kind, starts in (("npz", (0, 60)), ("compressed", (60, 300, 1500)))
        for start in starts
    ),
    ("an empty folder", lambda w: w.evaluating(w.folder()), ("no images", "made1")),
    ("empty class folders", lambda w: w.evaluating(w.folder("0/!a.txt")), ("no images", "made1", "10")),
    ("images without class folders", lambda w: w.evaluating(w.flat_folder()), ("made1", "no labels")),
    ("fewer class folders than classes", lambda w: w.evaluating(
        [(made := w.folder()), (made / "0").mkdir(), (made / "1").mkdir()][0]
    ), ("2 class folders", "made1", "10 classes")),
    ("a program in an image's clothes", lambda w: w.evaluating(
        [(made := w.folder("0/a.png")), (made / "0" / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")][0]
    ), ("a.png", "not a readable image")),
    ("an image of 16 bits", lambda w: w.evaluating(w.deep_image()), ("a.png", "8 bits")),
    ("only files of other kinds", lambda w: w.evaluating(w.folder("0/!a.txt", "0/!b.gif")), ("no images",)),
    ("a file that is no image", lambda w: w.evaluating(w.folder("0/a.png", "1/!b.png")), ("b.png",)),
    ("an image cut off", lambda w: w.evaluating(w.cut_image()), ("broken.png",)),
    ("an empty image", lambda w: w.evaluating(
        [(made := w.folder("0/a.png", "0/b.png")), (made / "0" / "b.png").write_bytes(b"")][0]
    ), ("b.png",)),
    ("images too small", lambda w: w.evaluating(
        w.folder("0/a.png", size=(20, 30)), "--preprocess", "resize=6"
    ), ("a.png", "resize", "6×9")),
    ("more class folders than classes", lambda w: w.evaluating(
        w.folder("11/a.png", "12/a.png")
    ), ("12 class folders", "10 classes")),
]  # fmt: skip


@table(DATA)
def test_data(workshop, build, fragments):
    check_refused(workshop, build(workshop), fragments)


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

OPTIONS: list[Case] = [
    *(
        (f"keep {keep!r}", lambda w, keep=keep: w.pruning("--scope", "input", keep=keep), (fragment,))
        for keep, fragment in {
            "0": "`--keep 0`",
            "0/8": "`--keep 0/8`",
            "200": "`--keep 200`",
            "129": "`--keep 129`",
            "3/2": "`--keep 3/2`",
            "1.5": "`--keep 1.5`",
            "-1": "`--keep -1`",
            "-1/8": "`--keep -1/8`",
            "1/0": "`--keep 1/0`",
            "nan": "`--keep nan`",
            "inf": "`--keep inf`",
            "abc": "`--keep abc`",
            "1/8/2": "`--keep 1/8/2`",
            "": "`--keep ",
        }.items()
    ),
    *(
        (f"unknown {option}", lambda w, option=option: w.pruning(option, "some"), (option, "some"))
        for option in ("--scope", "--signal", "--compensate", "--output-format")
    ),
    *(
        (f"{option} without a value", lambda w, option=option: w.pruning(option, ""), (option,))
        for option in ("--scope", "--signal", "--compensate", "--output-format")
    ),
    ("format in capitals", lambda w: ["inspect", w.single, "--output-format", "JSON"], ("JSON", "json")),
    ("unknown dtype", lambda w: w.evaluating("digits", "--dtype", "int8"), ("--dtype int8",)),
    ("no batch", lambda w: w.evaluating("digits", "--batch-size", "0"), ("--batch-size 0",)),
    ("batch below 0", lambda w: w.evaluating("digits", "--batch-size", "-4"), ("--batch-size -4",)),
    *(
        (f"device {device!r}", lambda w, device=device: w.evaluating(
            "digits", "--device", device
        ), (f"`{device}`",))
        for device in ("cuda:97", "nonsense", "cpu:1", "cuda:-1", "", "meta")
    ),
    *(
        (f"gate {option} {limit}", lambda w, option=option, limit=limit: w.evaluating(
            "digits", "--baseline", w.single, option, limit
        ), (option,))
        for option, limit in (
            ("--max-accuracy-drop", "-0.1"), ("--min-accuracy", "1.01"), ("--min-accuracy", "95"),
            ("--min-flops-reduction", "2"), ("--min-size-reduction", "-1"), ("--min-agreement", "nan"),
            ("--max-accuracy-drop", "inf"),
        )
    ),
    *(
        (f"gate {option} without baseline", lambda w, option=option: w.evaluating(
            "digits", option, "0.5"
        ), (option, "--baseline"))
        for option in (
            "--max-accuracy-drop", "--min-flops-reduction", "--min-size-reduction", "--min-agreement",
        )
    ),
    ("baseline of other classes", lambda w: w.evaluating(
        "digits", "--baseline", w.other_model(classes=7)
    ), ("baseline", "10", "7")),
    ("baseline for other images", lambda w: w.evaluating(
        "digits", "--baseline", w.other_model(image=(8, 16))
    ), ("baseline", "16")),
    ("baseline for smaller images", lambda w: w.evaluating(
        "digits", "--baseline", w.other_model(image=(4, 4), patch=1)
    ), ("baseline", "4")),
    ("baseline of other preprocessing", lambda w: w.evaluating(
        "digits", "--baseline", w.with_metadata(preprocessing={"mean": [0.1]})
    ), ("baseline", "mean")),
    ("sweep with a baseline", lambda w: w.sweeping("1/8", "--baseline", w.single), ("--sweep", "--baseline")),
    ("sweep with a gate", lambda w: w.sweeping("1/8", "--min-accuracy", 0.5), ("--min-accuracy", "--sweep")),
    ("sweep without analysis", lambda w: w.evaluating("digits", "--sweep", "1/8"), ("--sweep", "--analysis")),
    *(
        (f"sweep of {shares!r}", lambda w, shares=shares: w.sweeping(shares), ("--sweep",))
        for shares in ("", ",", "1/8,", "0", "1/8,2/1", "a", "1/8;1/4", "200", "-1")
    ),
    *(
        (f"sweep with unknown {option}", lambda w, option=option: w.sweeping(
            "1/8", option, "some"
        ), (option, "some"))
        for option in ("--scope", "--signal", "--compensate")
    ),
    ("sweep of a pruned model", lambda w: [
        w.run("prune", w.single, "--keep", "1/8", "--scope", "input", "-o", made := w.path(".safetensors")),
        "eval", made, "--data", "digits", "--limit", 10, "--sweep", "1/8", "--analysis", w.analysis,
    ][1:], ("pruned",)),
    *(
        (f"eval with {option}", lambda w, option=option, value=value: w.evaluating(
            "digits", option, value
        ), (option, "--sweep"))
        for option, value in (
            ("--scope", "static"), ("--signal", "combine"), ("--compensate", "mean"),
        )
    ),
    ("static without calibration", lambda w: w.pruning(), ("--analysis", "--data")),
    ("deviation without calibration", lambda w: w.pruning(
        "--scope", "input", "--signal", "deviation"
    ), ("deviation", "--analysis")),
    ("mean without calibration", lambda w: w.pruning("--scope", "batch", "--compensate", "mean"), ("mean",)),
    ("data of another split than the analysis's", lambda w: w.pruning(
        "--analysis", w.analysis, "--data", "digits:train"
    ), ("digits:train", "not the data of the analysis")),
    ("two splits", lambda w: w.evaluating("digits:train", "--split", "test"), ("--split test", "digits")),
    ("a split of a file", lambda w: w.evaluating(w.npz(), "--split", "test"), ("--split test",)),
    ("a limit without data", lambda w: w.pruning("--analysis", w.analysis, "--limit", 9), ("--limit",)),
    ("lstsq without calibration", lambda w: w.pruning(
        "--scope", "input", "--compensate", "lstsq"
    ), ("lstsq", "--analysis", "--data")),
    *(
        (f"preprocess {setting!r}", lambda w, setting=setting: w.evaluating(
            w.npz(inputs=np.zeros((SAMPLES, 1, 8, 8), "u1")), "--preprocess", setting
        ), fragments)
        for setting, fragments in {
            "crop=224": ("`crop`", "resize"),
            "": ("--preprocess ",),
            "=3": ("--preprocess =3",),
            "mean": ("--preprocess mean",),
            "mean=": ("mean",),
            "mean=grey": ("mean", "grey"),
            "mean=0.1,0.2": ("mean", "2 values", "1 channels"),
            "mean=nan": ("mean",),
            "mean=inf": ("mean",),
            "std=0": ("std",),
            "std=-1": ("std",),
            "std=inf": ("std",),
            "resize=0": ("resize",),
            "resize=8.5": ("resize", "8.5"),
            "interpolation=best": ("interpolation", "best", "bilinear"),
        }.items()
    ),
    ("a file with two means for one channel", lambda w: [
        "eval", w.with_metadata(preprocessing={"mean": [0, 0]}), "--data", "digits",
    ], ("mean", "2 values", "1 channels")),
    ("analyze a pruned model", lambda w: [
        w.run("prune", w.single, "--keep", "1/8", "--scope", "input", "-o", made := w.path(".safetensors")),
        "analyze", made, "--data", "digits", "-o", w.output,
    ][1:], (f"`{LAYER}`", "pruned")),
]  # fmt: skip


@table(OPTIONS)
def test_options(workshop, build, fragments):
    check_refused(workshop, build(workshop), fragments)


LSTSQ = ("--compensate", "lstsq", "--data", "digits", "--limit", 20)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**60, 2**64, 10**30])
@pytest.mark.parametrize("options", [("--signal", "random"), LSTSQ])
def test_a_large_seed_works_or_is_refused(workshop, seed, options):
    result = workshop.run(*workshop.pruning("--seed", seed, *options))
    assert "Traceback" not in result.stderr
    if seed < 2**32:
        assert result.code == 0
    elif result.code != 0:
        assert result.code == 2
        assert "--seed" in result.stderr
        assert result.stdout == ""
        assert not workshop.output.exists()


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--limit", "0"], "--limit"),
        (["--limit", "few"], "--limit"),
        (["--seed", "-1"], "--seed"),
        (["--batch-size", "x"], "--batch-size"),
        (["--min-accuracy", "high"], "--min-accuracy"),
        (["--nonsense"], "--nonsense"),
        (["--data"], "--data"),
        (["more"], "more"),
    ],
)
def test_usage_errors(workshop, words, fragment):
    result = workshop.run(*workshop.evaluating("digits"), *words)
    assert (result.code, result.stdout) == (2, "")
    assert fragment in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words", [["prune"], ["prune", "x"], ["eval", "x"], ["analyze", "x", "-o", "y"], ["fit"]]
)
def test_calls_that_lack_something(run, words):
    result = run(*words)
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


# --- outputs -----------------------------------------------------------------------------------


def existing(workshop: Workshop, name: str = "old.safetensors") -> Path:
    path = workshop.out / name
    path.write_bytes(b"keep me")
    return path


def writers(output: Callable[[Workshop], Path]) -> list[tuple[str, Build]]:
    """Every command that writes a file, writing to this path."""
    return [
        ("analyze", lambda w: ["analyze", w.single, "--data", "digits", "--limit", 9, "-o", output(w)]),
        ("prune", lambda w: w.pruning("--scope", "input", output=output(w))),
        ("inspect report", lambda w: ["inspect", w.single, "--output-file", output(w)]),
        ("eval report", lambda w: w.evaluating("digits", "--limit", 9, "--output-file", output(w))),
        ("prune report", lambda w: w.pruning("--scope", "input", "--output-file", output(w))),
    ]


OUTPUTS: list[Case] = [
    *(
        (f"{name} to a file that exists", build, ("old.safetensors", "--force"))
        for name, build in writers(existing)
    ),
    *((f"{name} to a directory", build, ("out", "directory")) for name, build in writers(lambda w: w.out)),
    *(
        (f"{name} into no directory", build, ("missing",))
        for name, build in writers(lambda w: w.out / "missing" / "x.safetensors")
    ),
    *(
        (f"{name} into a file", build, ("old.safetensors",))
        for name, build in writers(lambda w: existing(w) / "x.safetensors")
    ),
    *(
        (f"{name} to an impossible name", build, ("xxx",))
        for name, build in writers(lambda w: w.out / ("x" * 300))
    ),
    ("report and checkpoint to one file", lambda w: w.pruning(
        "--scope", "input", "--output-file", w.output
    ), ("new.safetensors", "--output-file")),
    ("report and checkpoint to one file that exists", lambda w: w.pruning(
        "--scope", "input", "--force", "--output-file", w.out / ".." / "out" / "old.safetensors",
        output=existing(w),
    ), ("old.safetensors", "--output-file")),
    ("report and analysis to one file", lambda w: [
        "analyze", w.single, "--data", "digits", "--limit", 9, "-o", w.output, "--output-file", w.output,
    ], ("new.safetensors", "--output-file")),
    ("demo to a file", lambda w: ["demo", "-o", existing(w)], ("old.safetensors", "directory")),
    ("demo into a file", lambda w: ["demo", "-o", existing(w) / "x"], ("old.safetensors",)),
    ("demo to a directory that is not empty", lambda w: [
        "demo", "-o", existing(w).parent,
    ], ("out", "--force")),
    ("demo report to a file that exists", lambda w: [
        "demo", "-o", w.out / "demo", "--output-file", existing(w),
    ], ("old.safetensors", "--force")),
]  # fmt: skip


@table(OUTPUTS)
def test_outputs(workshop, build, fragments):
    check_refused(workshop, build(workshop), fragments)


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
        for _, build in writers(lambda w: w.out / "x.safetensors"):
            check_refused(workshop, build(workshop), ("out", "permission"))
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
        workshop.with_analysis(workshop.analysis_with()),
        workshop.pruning(
            "--analysis", workshop.rewritten_npz()[0], "--compensate", "lstsq", "--force"
        ),
    ]  # fmt: skip
    for call in words:
        result = workshop.run(*call)
        assert result.code == 0, (call, result.stderr)


def test_the_longest_names_can_be_written(workshop):
    """The temporary beside them has a name that is no longer."""
    path = workshop.out / ("ä" * 127)
    result = workshop.run("inspect", workshop.single, "--output-file", path)
    assert (result.code, result.stderr) == (0, "")
    assert list(workshop.out.iterdir()) == [path]


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
