"""Whatever is wrong with a call or a file: exit code 2, an error that names it, and nothing left behind."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from tests.damage import Call, metadata_of, removed, replaced, with_metadata
from tests.endings import refusal
from tests.stock import ARRAY_FILES, write_arrays

SAMPLES = 12
LAYER = "blocks.0.soft_moe"
PLAN = {"scope": "static", "k": 2, "num_experts": 128, "signal": "combine", "compensation": "none", "kept": [3, 5]}
INPUTS = np.random.default_rng(0).random((SAMPLES, 1, 8, 8), dtype=np.float32)
LABELS = np.arange(SAMPLES) % 10
GONE = object()
"""In place of a value: without it."""


def with_value(sample: int, value: float) -> np.ndarray:
    """Inputs with one value that is another."""
    inputs = INPUTS.copy()
    inputs[sample, 0, 3, 4] = value
    return inputs


@dataclass
class Workshop:
    """Makes damaged files under `root`; what commands may write goes to `out`."""

    root: Path
    single: Path
    analysis: Path
    vit: Path
    vit_analysis: Path
    run: Callable[..., Any]
    made: int = 0

    def __post_init__(self) -> None:
        self.marker, self.out = self.root / "unpickled", self.root / "out"
        self.out.mkdir()
        self.output = self.out / "new.safetensors"

    def path(self, suffix: str) -> Path:
        self.made += 1
        return self.root / f"made{self.made}{suffix}"

    def file(self, content: bytes, suffix: str = ".safetensors") -> Path:
        path = self.path(suffix)
        path.write_bytes(content)
        return path

    def old(self, name: str = "old.safetensors") -> Path:
        """An output that is there already."""
        path = self.out / name
        path.write_bytes(b"keep me")
        return path

    def with_tensors(self, source: Path | None = None, **changed: object) -> Path:
        """`single` with other tensors, or with them changed by a function. `__` in a name stands for a dot."""
        source = source or self.single
        tensors = load_file(source)
        for key, new in changed.items():
            name = key.replace("__", ".")
            tensors[name] = new(tensors[name]).contiguous() if callable(new) else new
        path = self.path(".safetensors")
        metadata = {"moeprune": json.dumps(metadata_of(source.read_bytes()))}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not GONE}, path, metadata)
        return path

    def with_metadata(self, changes: dict[str, object], source: Path | None = None) -> Path:
        """`single` with other metadata; the keys name places, such as `architecture blocks 0`."""
        whole = (source or self.single).read_bytes()
        metadata = metadata_of(whole)
        for place, new in changes.items():
            keys = tuple(int(key) if key.isdigit() else key for key in place.split())
            metadata = removed(metadata, keys) if new is GONE else replaced(metadata, keys, new)
        return self.file(with_metadata(whole, json.dumps(metadata)))

    def arrays(self, kind: str = "npz", **changed: object) -> Path:
        """A file of good inputs and labels, some of them changed; None removes one."""
        arrays = {"inputs": INPUTS, "labels": LABELS, **changed}
        kept = {name: array for name, array in arrays.items() if array is not None}
        return write_arrays(kind, self.path(""), kept)

    def claiming(self, name: str, old: str, new: str, cut: int = 0) -> Path:
        """Good arrays, but for the header of one, or without the last bytes of it, in a sound archive."""
        path = self.arrays()
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
        content = bytearray(self.arrays().read_bytes())
        for place in re.finditer(b"PK\1\2", bytes(content)):
            content[place.start() + 8] |= 1
        return self.file(bytes(content), ".npz")

    def folder(self, *files: str, size: tuple[int, int] = (8, 8), classes: int = 10, **contents: Any) -> Path:
        """A folder of grey images; with other contents where they are given, by names of files in the class 0."""
        image = pytest.importorskip("PIL.Image")
        path = self.path("")
        path.mkdir()
        for label in range(classes):
            (path / str(label)).mkdir()
        for name in files:
            (path / name).parent.mkdir(exist_ok=True)
            image.new("L", size, 100).save(path / name)
        for name, content in contents.items():
            target = path / "0" / name.replace("_", ".")
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                image.fromarray(content).save(target)
        return path

    def cut(self, path: Path, share: float) -> Path:
        os.truncate(path, int(share * path.stat().st_size))
        return path

    def damaged(self, path: Path, start: int) -> Path:
        content = bytearray(path.read_bytes())
        content[start : start + 20] = b"\xff" * 20
        path.write_bytes(content)
        return path

    def other_model(self, classes: int = 10, image: tuple[int, int] = (8, 8), patch: int = 2) -> Path:
        """A small untrained checkpoint that takes other images or tells other classes apart."""
        block = BlockConfig(attention=False, soft_moe=SoftMoEConfig(8, 4, 1, 4))
        config = ViTConfig(image, (patch, patch), 1, classes, dim=8, num_heads=1, blocks=(block,))
        model = SoftMoEViT(config, details=moeprune.load(self.single).details)
        model.blocks[0].soft_moe.reset_parameters(torch.Generator().manual_seed(0))
        path = self.path(".safetensors")
        moeprune.save(model, path)
        return path

    def outdated(self, **changed: object) -> Path:
        """An analysis of a file that was changed or removed afterwards."""
        data, analysis = self.arrays(), self.path(".safetensors")
        assert self.run("analyze", self.single, "--data", data, "-o", analysis).code == 0
        data.unlink()
        if changed:
            np.savez(data, **{"inputs": INPUTS, "labels": LABELS, **changed})
        return analysis

    def words(self, text: str, path: object = None) -> list[object]:
        """The words of a command; those in capitals stand for paths, which are made where they are used."""
        paths: dict[str, Any] = {
            "SINGLE": self.single, "VIT": self.vit, "OF_VIT": self.vit_analysis, "NEW": self.output,
            "PAGE": partial(self.old, "old.html"), "ANALYSIS": self.analysis, "OUT": self.out, "PATH": path,
            "OLD": self.old, "LONG": self.out / ("x" * 300), "PRUNED": self.pruned, "BELOW": lambda: self.old() / "x",
            "MISSING": self.out / "missing" / "x.safetensors", "NPZ": self.arrays, "OTHER": self.other_model,
            "FEWER": partial(self.other_model, classes=7), "WIDE": partial(self.other_model, image=(8, 16)),
            "SMALL": partial(self.other_model, image=(4, 4), patch=1),
            "DARK": partial(self.with_metadata, {"preprocessing": {"mean": [0.1]}}),
            "MEANS": partial(self.with_metadata, {"preprocessing": {"mean": [0, 0]}}),
        }  # fmt: skip
        found = [paths.get(word, word) for word in text.split()]
        return [word() if callable(word) else word for word in found]

    def pruned(self) -> Path:
        path = self.path(".safetensors")
        assert self.run(*self.words(f"{ROUTED} -o PATH", path)).code == 0
        return path

    def refuse(self, words: str, *fragments: str, path: object = None) -> str:
        """Run a command that must be refused; returns its stderr."""
        error = refusal(self.run, self.words(words, path), *fragments, folder=self.out)
        assert not self.marker.exists()
        return error


def bomb(workshop: Workshop) -> Call:
    """Leaves a file behind when it is unpickled."""
    return Call(Path.touch, workshop.marker)


@pytest.fixture
def workshop(tmp_path, single, small_analysis, vit, vit_analysis, run):
    return Workshop(tmp_path, single, small_analysis, vit, vit_analysis, run)


# --- checkpoints
EVAL = "eval SINGLE --data digits"
PAPER = "--scope input --signal combine --compensate none"
ROUTED = f"prune SINGLE --keep 1/8 {PAPER}"
PRUNE = "prune SINGLE --keep 1/8 -o NEW"
Make = Callable[[Workshop], object]
UNREADABLE: dict[str, tuple[Make, str]] = {
    "missing": (lambda w: w.root / "none.safetensors", "none.safetensors"),
    "an impossible name": (lambda w: w.root / ("x" * 300), "xxx"),
    "empty": (lambda w: w.file(b""), "empty"),
    "random bytes": (lambda w: w.file(np.random.default_rng(0).bytes(5000)), "made1.safetensors"),
    "a pickle": (lambda w: w.file(pickle.dumps(bomb(w))), "made1.safetensors"),
    "a directory": (lambda w: w.out, "folder"),
    "trailing bytes": (lambda w: w.file(w.single.read_bytes() + b"\0"), "made1.safetensors"),
    "cut": (lambda w: w.file(w.single.read_bytes()[:9000]), "truncated"),
}
COMMANDS_ON = {
    "inspect": "inspect PATH",
    "analyze": "analyze PATH --data digits -o NEW",
    "prune": f"prune PATH --keep 1/8 {PAPER} -o NEW",
    "prune with it as analysis": f"{PRUNE} --analysis PATH",
    "eval": "eval PATH --data digits",
    "eval with it as baseline": f"{EVAL} --baseline PATH",
}


@pytest.mark.parametrize("command", COMMANDS_ON)
@pytest.mark.parametrize(("make", "fragment"), UNREADABLE.values(), ids=UNREADABLE)
def test_files_that_cannot_be_read(workshop, command, make, fragment):
    workshop.refuse(COMMANDS_ON[command], fragment, path=make(workshop))


MOE = "architecture blocks 0 soft_moe"
METADATA: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "a list": ({"": []}, ("`moeprune`", "Expected `object`")),
    "kind is missing": ({"": {"format": 1}}, ("kind",)),
    "a newer format": ({"format": 2}, ("format 2",)),
    "no architecture": ({"architecture": None}, ("architecture",)),
    "preprocessing": ({"preprocessing": {"crop": 8}}, ("preprocessing", "crop")),
    "deviation of 0": ({"preprocessing": {"std": [0]}}, ("preprocessing", "std")),
    "NaN": ({"preprocessing": {"mean": [float("nan")]}}, ("`moeprune`", "malformed")),
    "images resized beyond all bounds": ({"preprocessing": {"resize": 10**6}}, ("resize", "16384")),
    "infinite provenance": ({"provenance": {"training": [float("inf")]}}, ("`moeprune`", "malformed")),
    "provenance nested too deep": ({"provenance a": json.loads("[" * 300 + "]" * 300)}, ("`moeprune`", "nested")),
    "provenance that is no text": ({"provenance a": "\ud800"}, ("`moeprune`",)),
    "provenance is null": ({"provenance": None}, ("provenance",)),
    "source is text": ({"source": "mine"}, ("source",)),
    "another kind of architecture": ({"architecture type": "cnn"}, ("`type`", "cnn")),
    "unknown key": ({"architecture depth": 3}, ("depth",)),
    "missing block": ({"architecture blocks": [None]}, ("blocks[0]",)),
    "blocks is a number": ({"architecture blocks": 1}, ("`blocks`",)),
    "image of no patches": ({"architecture image_size": [8, 7]}, ("`image_size`", "[8, 7]")),
    "patches of size 0": ({"architecture patch_size": [0, 2]}, ("`patch_size[0]`",)),
    "heads": ({"architecture num_heads": 3}, ("`num_heads` 3",)),
    "no classes": ({"architecture num_classes": 0}, ("unexpected `head.weight`",)),
    "an odd eps": ({"architecture norm_eps": "1e-6"}, ("`norm_eps`", "'1e-6'")),
    "no class token": ({"architecture class_position": False}, ("`class_token` true",)),
    "other classes": ({"architecture num_classes": 9}, ("`head.weight`", "[10, 32]", "[9, 32]")),
    "huge": ({"architecture num_classes": 10**30}, ("made1.safetensors", "too large")),
    "too many digits to print": (
        {f"architecture {key}": 10**4000 for key in ("in_channels", "patch_size 0", "image_size 0")}, ("too large",),
    ),
    "pooling": ({"architecture pooling": "max"}, ("`pooling`", "max")),
    "token that is not there": ({"architecture pooling": "token"}, ("`pooling`",)),
    "unknown key in a block": ({"architecture blocks 0 norm": True}, ("blocks[0]", "norm")),
    "no Soft MoE": ({MOE: None, "architecture blocks 0 mlp_dim": 4}, ("no MoE layers",)),
    "MLP and Soft MoE": ({"architecture blocks 0 mlp_dim": 4}, ("`mlp_dim`", "`soft_moe`")),
    "residual is text": ({"architecture blocks 0 residual": "no"}, ("blocks[0].residual`",)),
    "unknown key in a Soft MoE": ({f"{MOE} gate": 1}, ("soft_moe", "gate")),
    "another width": ({f"{MOE} dim": 16}, ("width 16", "`dim` 32")),
    "other experts": ({f"{MOE} num_experts": 64}, (f"`{LAYER}.fc1_bias`", "[128, 4]", "2 more")),
    "no experts": ({f"{MOE} num_experts": 0}, ("soft_moe.num_experts`",)),
    "router": ({f"{MOE} router_norm": "l1"}, ("soft_moe.router_norm`", "l1")),
    "plan of an unknown layer": ({"plan": {"blocks.7.soft_moe": PLAN}}, ("blocks.7.soft_moe",)),
    "plan of a layer is null": ({"plan": {LAYER: None}}, (LAYER,)),
    "missing key in the plan": ({"plan": {LAYER: {"k": 2}}}, (LAYER, "scope")),
    **{
        f"plan, {name}": ({"plan": {LAYER: PLAN | changed}}, (LAYER, *fragments))
        for name, changed, *fragments in (
            ("other experts", {"num_experts": 64}),
            ("kept out of range", {"kept": [3, 128]}, "`kept`", "128"),
            ("kept in no order", {"kept": [5, 3]}, "`kept`"),
            ("too many kept", {"kept": [3, 4, 5]}, "`kept`"),
            ("k above n", {"scope": "input", "k": 129, "kept": None}, "`k`", "129"),
            ("kept without static", {"scope": "batch"}, "`kept`"),
            ("static without kept", {"kept": None}, "`kept`"),
            ("unknown compensation", {"compensation": "sum"}, "`compensation`", "sum"),
            ("unknown key", {"budget": 1}, "budget"),
            ("of a dense file", {}, f"`{LAYER}.fc1_weight`", "[128, 32, 4]"),
        )
    },
}  # fmt: skip
"""Changes to the metadata of a checkpoint, and what the error names."""
NO_CHECKPOINT: dict[str, tuple[Make, tuple[str, ...]]] = {
    **{name: (lambda w, c=c: w.with_metadata(c), texts) for name, (c, texts) in METADATA.items()},
    "no metadata": (
        lambda w: save_file(load_file(w.single), made := w.path(".safetensors")) or made,
        ("made1.safetensors", "lost its metadata"),
    ),
    "metadata is no JSON": (
        lambda w: w.file(with_metadata(w.single.read_bytes(), "{format: 1}")), ("`moeprune`", "JSON"),
    ),
    "an analysis": (lambda w: w.analysis, ("analysis",)),
    "integers": (
        lambda w: w.with_tensors(head__bias=torch.arange(10), position=torch.ones(16, 32, dtype=torch.int8)),
        ("`head.bias`", "int64", "`position`", "int8"),
    ),
    "another precision": (lambda w: w.with_tensors(head__weight=torch.Tensor.double), ("`head.weight`", "float64")),
    "8-bit floats": (
        lambda w: w.with_tensors(head__weight=lambda t: t.to(torch.float8_e4m3fn)), ("`head.weight`", "float8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "eval"])
@pytest.mark.parametrize(("make", "fragments"), NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_checkpoints_that_are_none(workshop, command, make, fragments):
    workshop.refuse(COMMANDS_ON[command], *fragments, path=make(workshop))


@pytest.mark.parametrize("command", [name for name in COMMANDS_ON if "analysis" not in name])
def test_all_missing_unexpected_and_misshapen_tensors_are_listed(workshop, command):
    path = workshop.with_tensors(
        head__bias=GONE, patch_embed__weight=GONE, head__gain=torch.ones(3), blocks__0__extra=torch.ones(1),
        head__weight=torch.ones(10, 31), position=torch.ones(1, 16, 32),
    )  # fmt: skip
    expected = (
        "missing `head.bias`", "missing `patch_embed.weight`", "unexpected `head.gain`", "unexpected `blocks.0.extra`",
        "`head.weight` is [10, 31], expected [10, 32]", "`position` is [1, 16, 32], expected [16, 32]", path.name,
    )  # fmt: skip
    workshop.refuse(COMMANDS_ON[command], *expected, path=path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("command", ["analyze", "prune", "eval", "eval with it as baseline"])
def test_weights_that_are_no_numbers_are_named(workshop, command, value):
    def one_value(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(value))

    path = workshop.with_tensors(head__weight=one_value, blocks__0__soft_moe__phi=one_value)
    error = workshop.refuse(COMMANDS_ON[command], "`head.weight`", f"`{LAYER}.phi`", path.name, path=path)
    assert "`head.bias`" not in error


@pytest.mark.parametrize(
    ("command", "name", "fragment"), [("eval", "head__weight", "digits"), ("analyze", f"{LAYER}.fc2_weight", LAYER)]
)
def test_finite_weights_that_overflow(workshop, command, name, fragment):
    path = workshop.with_tensors(**{name: lambda tensor: torch.full_like(tensor, 3e38)})
    workshop.refuse(f"{COMMANDS_ON[command]} --limit 10", "NaN or infinite", f"`{fragment}", path=path)


# --- analyses
OF_ANALYSIS: dict[str, tuple[dict[str, object], str]] = {
    "an older format": ({"format": 1}, "format 1"),
    "a newer format": ({"format": 3}, "format 3"),
    "no layers": ({"layers": []}, LAYER),
    "an unknown layer": ({"layers": ["x"]}, "x.mean_mass"),
    "layers is a number": ({"layers": 3}, "made1.safetensors"),
    "no origin": ({"origin": None}, "made1.safetensors"),
    "data that is text": ({"origin": {"checkpoint": "", "data": "a", "moeprune": ""}}, "data`"),
    "a fingerprint that is a number": ({"origin data fingerprint": 3}, "fingerprint"),
    "samples that are text": ({"origin data samples": "all"}, "samples"),
    "fewer samples than none": ({"origin data samples": -1}, "samples"),
    **{f"no {key} of its data": ({f"origin data {key}": GONE}, key) for key in ("spec", "samples", "fingerprint")},
}
TENSORS: dict[str, tuple[str, object, str]] = {
    "a tensor is missing": ("gram", GONE, f"{LAYER}.gram"),
    "too few experts": ("mean_mass", lambda t: t[:64], f"{LAYER}.term_mean"),
    "another width": ("term_mean", lambda t: t[..., :3], f"{LAYER}.term_mean"),
    "integers": ("deviation", torch.Tensor.int, f"{LAYER}.deviation"),
    "NaN": ("mean_mass", lambda t: t * float("nan"), f"`{LAYER}.mean"),
}
ANALYSES: dict[str, tuple[Make, str, tuple[str, ...]]] = {
    "a checkpoint": (lambda w: w.single, "mean", (".safetensors", "not an analysis")),
    **{
        name: (lambda w, changes=changes: w.with_metadata(changes, w.analysis), "lstsq", (fragment,))
        for name, (changes, fragment) in OF_ANALYSIS.items()
    },
    **{
        name: (lambda w, key=key, new=new: w.with_tensors(w.analysis, **{f"{LAYER}.{key}": new}), "mean", (fragment,))
        for name, (key, new, fragment) in TENSORS.items()
    },
    "of other samples": (lambda w: w.outdated(inputs=INPUTS / 2), "lstsq", ("made1.npz", "changed")),
    "of fewer samples": (lambda w: w.outdated(inputs=INPUTS[1:], labels=LABELS[1:]), "lstsq", ("made1.npz", "changed")),
    "of a file that is gone": (lambda w: w.outdated(), "lstsq", ("made1.npz",)),
    "of other data than is given": (lambda w: w.analysis, "lstsq --data digits:train --limit 60", ("digits:train",)),
    "of another limit": (lambda w: w.analysis, "lstsq --data digits --limit 50", ("50 samples", "60 samples")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "fragments"), ANALYSES.values(), ids=ANALYSES)
def test_analyses(workshop, make, options, fragments):
    workshop.refuse(f"{PRUNE} --analysis PATH --compensate {options}", *fragments, path=make(workshop))


# --- data
ARRAYS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "of another size": ({"inputs": np.zeros((SAMPLES, 1, 9, 8), "f4")}, ("[12, 1, 9, 8]",)),
    "of one number": ({"inputs": np.zeros((), "f4")}, ("[]", "[n, 1, 8, 8]")),
    "of integers": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), "i4")}, ("int32", "uint8")),
    "of nothing": ({"inputs": np.zeros((0, 1, 8, 8), "f4"), "labels": np.zeros(0, "i8")}, ("no samples",)),
    "of NaN": ({"inputs": with_value(7, float("nan"))}, ("sample 7", "NaN")),
    "of infinity": ({"inputs": with_value(9, float("-inf"))}, ("sample 9", "infinite")),
    "without labels": ({"labels": None}, ("labels",)),
    "with a class too many": ({"labels": np.arange(SAMPLES)}, ("sample 10", "label 10")),
    "with a label below 0": ({"labels": np.arange(SAMPLES) - 1}, ("sample 0", "label -1")),
    "with labels that are floats": ({"labels": np.zeros(SAMPLES)}, ("`labels`", "integers")),
    "with too few labels": ({"labels": np.zeros(SAMPLES - 1, "i8")}, ("`labels`", "[11]", "[12]")),
    "with labels in a column": ({"labels": np.zeros((SAMPLES, 1), "i8")}, ("`labels`", "[12, 1]")),
}
ARCHIVES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "a label above all integers": ({"labels": np.full(SAMPLES, 2**64 - 1, "u8")}, (str(2**64 - 1),)),
    "no array of inputs": ({"inputs": None}, ("`inputs`", "labels")),
    "inputs that are text": ({"inputs": np.full((SAMPLES, 1, 8, 8), "a")}, ("inputs", "made1.npz")),
    "inputs that are records": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), [("a", "f4")])}, ("inputs",)),
    "inputs that are complex": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), "c8")}, ("inputs", "complex64")),
    "Fortran order": ({"inputs": np.zeros((SAMPLES, 1, 8, 8), "f4", order="F")}, ("made1.npz", "Fortran")),
}
"""What only an archive of numpy can hold."""
DATA: dict[str, tuple[Make, tuple[str, ...]]] = {
    "missing": (lambda w: w.root / "none.npz", ("none.npz",)),
    "an impossible name": (lambda w: "x" * 300, ("xxx",)),
    "unknown split": (lambda w: "digits:validation", ("`validation`", "calibration")),
    "another kind of file": (lambda w: w.file(b"1,2\n", ".csv"), ("made1.csv",)),
    "another model's data": (lambda w: "pairs", ("pairs", "[2000, 1, 8, 16]", "[n, 1, 8, 8]")),
    "random bytes as npz": (lambda w: w.file(b"\x93NUMPY" * 99, ".npz"), ("made1.npz",)),
    "random bytes as safetensors": (lambda w: w.file(b"abc" * 999), ("made1.safetensors",)),
    "a checkpoint": (lambda w: w.single, ("`inputs`", "single.safetensors")),
    **{
        f"{kind} {name}": (lambda w, kind=kind, arrays=arrays: w.arrays(kind, **arrays), fragments)
        for kind, rows in (("npz", ARRAYS | ARCHIVES), ("safetensors", ARRAYS))
        for name, (arrays, fragments) in rows.items()
    },
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
    **{
        f"{name} that are objects": (
            lambda w, name=name: w.arrays(**{name: np.array([bomb(w)] * SAMPLES, dtype=object)}),
            ("made1.npz", "object_"),
        )
        for name in ("inputs", "labels")
    },
    "a pickle as npz": (lambda w: w.file(pickle.dumps(bomb(w)), ".npz"), ("made1.npz",)),
    **{
        f"{kind} cut at {share}": (lambda w, kind=kind, share=share: w.cut(w.arrays(kind), share), ("made1.",))
        for kind in ARRAY_FILES
        for share in (0.01, 0.5, 0.99)
    },
    **{
        f"{kind} damaged at {start}": (
            lambda w, kind=kind, start=start: w.damaged(w.arrays(kind), start), ("made1.npz",),
        )
        for kind, starts in (("npz", (0, 60)), ("compressed", (60, 300, 1500)))
        for start in starts
    },
    "an empty folder": (lambda w: w.folder(classes=0), ("no images", "made1")),
    "empty class folders": (lambda w: w.folder(a_txt=b""), ("no images", "made1", "10")),
    "images without class folders": (lambda w: w.folder("a.png", classes=0), ("made1", "no labels")),
    "fewer class folders than classes": (lambda w: w.folder(classes=2), ("2 class folders", "made1", "10 classes")),
    "more class folders than classes": (lambda w: w.folder("11/a.png", "12/a.png"), ("12 class folders", "10 classes")),
    "an image of another kind": (
        lambda w: w.folder("0/a.png", b_png=b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("b.png", "not a readable image"),
    ),
    "an image of 16 bits": (lambda w: w.folder(a_png=np.full((8, 8), 3000, np.uint16)), ("a.png", "8 bits")),
    "only files of other kinds": (lambda w: w.folder(a_txt=b"text", b_eps=b"text"), ("no images",)),
    "a file that is no image": (lambda w: w.folder("1/a.png", b_png=b"no image"), ("b.png",)),
    "an image cut off": (
        lambda w: w.cut((w.folder("0/a.png", "1/broken.png", size=(64, 64)) / "1" / "broken.png"), 0.5).parents[1],
        ("broken.png",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "fragments"), DATA.values(), ids=DATA)
def test_data(workshop, make, fragments):
    workshop.refuse("eval SINGLE --data PATH", *fragments, path=make(workshop))


def test_images_too_small(workshop):
    folder = workshop.folder("0/a.png", size=(20, 30))
    workshop.refuse("eval SINGLE --data PATH --preprocess resize=6", "a.png", "resize", "6×9", path=folder)


@pytest.mark.parametrize("name", ["of NaN", "with a class too many"])
@pytest.mark.parametrize("kind", ["npz", "compressed"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_analyze_names_the_bad_sample_whatever_its_batch(workshop, name, kind, batch_size):
    changed, fragments = ARRAYS[name]
    command = f"analyze SINGLE --data PATH -o NEW --batch-size {batch_size}"
    workshop.refuse(command, *fragments, path=workshop.arrays(kind, **changed))


def test_a_bad_sample_is_named_by_its_place_in_the_file(workshop):
    words = workshop.words("eval SINGLE --data PATH --limit", workshop.arrays(inputs=with_value(8, float("nan"))))
    results = [workshop.run(*words, SAMPLES - left) for left in (1, 2, 3)]
    refused = [result for result in results if result.code == 2]
    assert refused
    assert all("sample 8 " in result.stderr for result in refused)


# --- options
SWEEP = f"{EVAL} --limit 10 --analysis ANALYSIS --sweep 1/8"
VIT_PRUNE = "prune VIT --analysis OF_VIT"
MERGE = f"{VIT_PRUNE} --keep 8 --compensate merge -o NEW"
ONE_SHOT = "prune VIT --keep 4 --one-shot -o NEW"
ENERGY = "prune VIT --keep 4 --data pairs -o NEW --energy"
NONE = "eval none --data digits"  # there is no such checkpoint, but nobody has looked yet
OPTIONS = {
    f"{EVAL} --max-accuracy-drop 0.5": ("--max-accuracy-drop", "--baseline"),
    f"{EVAL} --min-flops-reduction 0.5": ("--min-flops-reduction", "--baseline"),
    f"{EVAL} --min-size-reduction 0.5": ("--min-size-reduction", "--baseline"),
    f"{EVAL} --min-agreement 0.5": ("--min-agreement", "--baseline"),
    f"{EVAL} --baseline FEWER": ("baseline", "10", "7"),
    f"{EVAL} --baseline WIDE": ("baseline", "16"),
    f"{EVAL} --baseline SMALL": ("baseline", "4"),
    f"{EVAL} --baseline DARK": ("baseline", "mean"),
    f"{EVAL} --baseline PRUNED": ("is pruned, expected the full model",),
    f"{SWEEP} --baseline SINGLE": ("--sweep", "--baseline"),
    f"{SWEEP} --min-accuracy 1": ("--min-accuracy", "--sweep"),
    f"{SWEEP} --scope input --compensate merge --signal combine": (
        "no way to prune has such a scope, signal and compensation",
    ),
    f"{EVAL} --sweep 1/8": ("--sweep", "--analysis"),
    "eval PRUNED --data digits --sweep 1/8 --analysis ANALYSIS": ("pruned",),
    f"{EVAL} --scope static": ("--scope", "--sweep"),
    f"{EVAL} --signal combine": ("--signal", "--sweep"),
    f"{EVAL} --compensate mean": ("--compensate", "--sweep"),
    PRUNE: (
        "`--compensate auto`, the default",
        "--data",
        "`--compensate none` is possible",
        "`--scope input --signal combine`",
    ),
    f"{PRUNE} --compensate none": ("--analysis", "--data"),
    f"{PRUNE} --scope input --signal deviation --compensate none": ("deviation", "--analysis"),
    f"{PRUNE} --scope batch --compensate mean": ("mean",),
    f"{PRUNE} --scope input --compensate lstsq": ("lstsq", "--analysis", "--data"),
    f"{PRUNE} --analysis ANALYSIS --data digits:train": ("digits:train", "not the data of the analysis"),
    f"{PRUNE} --analysis ANALYSIS --limit 9": ("--limit",),
    "prune OTHER --keep 1/2 -o NEW --analysis ANALYSIS": ("analysis", "another checkpoint"),
    f"prune PRUNED --keep 1/2 {PAPER} -o NEW": (f"layers `{LAYER}` are already pruned",),
    "prune SINGLE --keep 8 --data digits --save-plan NEW": ("`--save-plan` alone reads no `--data`",),
    "eval SINGLE --data digits:train --split test": ("--split test", "digits"),
    "eval SINGLE --data NPZ --split test": ("--split test",),
    f"{EVAL} --preprocess mean=0.1,0.2": ("mean", "2 values", "1 channels"),
    "eval MEANS --data digits": ("mean", "2 values", "1 channels"),
    "analyze PRUNED --data digits -o NEW": (f"`{LAYER}`", "pruned"),
    # budgets
    f"{VIT_PRUNE} --mass 0.9 --scope static -o NEW": ("with `--scope input`",),
    f"{VIT_PRUNE} --mass 1.2 -o NEW": ("`--mass`: expected `float` <= 1.0, found 1.2",),
    f"{VIT_PRUNE} --mass 0.9 --keep 4 -o NEW": ("`--keep` and `--mass` exclude each other",),
    f"{VIT_PRUNE} --keep 4": ("nothing to write",),
    f"{VIT_PRUNE} -o NEW": ("no number of experts to keep",),
    f"{VIT_PRUNE} --keep 4 --max-size 0.5 -o NEW": ("`--keep` and `--max-size` exclude each other",),
    f"{VIT_PRUNE} --max-size 0.05 -o NEW": ("give at least 0.1811",),
    f"{VIT_PRUNE} --max-size 0.05 --compensate none -o NEW": ("give at least 0.2",),
    f"{VIT_PRUNE} --max-flops 0.1 -o NEW": ("give at least 0.5075",),
    f"{VIT_PRUNE} --max-flops 0.1 --compensate none -o NEW": ("give at least 0.6",),
    f"{VIT_PRUNE} --max-size 0.9 --scope input --signal combine --compensate none -o NEW": ("give at least 1\n",),
    f"{VIT_PRUNE} --max-accuracy-drop 0.1 -o NEW": ("`--max-accuracy-drop` searches on labelled `--data`",),
    f"{VIT_PRUNE} --keep 4 --save-plan NEW -o NEW": ("`--save-plan` and another output are both",),
    f"{VIT_PRUNE} --plan plan.json --scope static -o NEW": ("`--scope` does not go with `--plan`",),
    f"{VIT_PRUNE} --plan missing.json -o NEW": ("no file `missing.json`",),
    f"{VIT_PRUNE} --keep 4 --scope input --signal gram -o NEW": ("`--signal gram` needs one set",),
    "prune VIT --max-size 0.5 -o NEW": ("needs calibration data",),
    "prune VIT --max-size 0.5 --signal random --compensate none -o NEW": (
        "`--max-size` with scope static needs an analysis",
    ),
    # compensations
    f"{MERGE} --one-shot": ("is fitted to data, not in one shot",),
    f"{MERGE} --scope input": ("needs one set of experts for all inputs, `--scope static`",),
    f"{MERGE} --signal gram": ("`--compensate merge` does not go with `--signal gram`",),
    f"{ENERGY} 0.9 --compensate mean": ("`--energy`",),
    f"{ENERGY} 1 --compensate affine": ("`--energy`",),
    "prune VIT --max-size 0.5 --data pairs -o NEW --energy 0.9 --compensate low-rank": ("give `--rank`",),
    f"{ONE_SHOT} --analysis OF_VIT --compensate lstsq": ("`lstsq` of layer `blocks.1.soft_moe` is fitted to data",),
    f"{ONE_SHOT} --analysis OF_VIT --compensate lstsq --scope input": ("`lstsq` of layer `blocks.1.soft_moe` is",),
    f"{ONE_SHOT} --analysis OF_VIT --data pairs": ("`--one-shot` and `--data` exclude each other",),
    ONE_SHOT: ("needs calibration",),
    # latency and confidence
    f"{NONE} --latency-batch 8": ("`--latency-batch` goes with `--latency`",),
    f"{NONE} --latency --latency-batch 8 --latency-batch -1": ("`--latency-batch` `[1]`: expected", "found -1"),
    f"{NONE} --sweep 1/8 --analysis a --min-speedup 2": ("`--min-speedup` does not go with",),
    f"{NONE} --sweep 1/8 --analysis a --latency-batch 1": ("`--latency-batch` goes with",),
    f"{NONE} --latency --min-speedup 2": ("compares with the full model\n\nhint: give it with `--baseline`",),
    f"{NONE} --baseline b --min-speedup 2": ("`--min-speedup` judges measured times\n\nhint: give it", "`--latency`"),
    f"{NONE} --confidence 0.49 --min-accuracy 0.5": ("`--confidence 0.49` is not within 0.5 and 1",),
    f"{NONE} --confidence 0.95": ("`--confidence` goes with a gate",),
    f"{NONE} --confidence 0.95 --sweep 1/8 --analysis a.st": ("does not go with `--sweep`",),
    # plots and pages
    f"{EVAL} --plot f.png": ("`--sweep` and `--plot` need `--analysis`",),
    f"{EVAL} --plot f.pdf --analysis ANALYSIS": ("is not a plot",),
    f"{EVAL} --plot f.png --analysis ANALYSIS --min-accuracy 1": ("`--min-accuracy` does not go",),
    f"{EVAL} --plot f.png --analysis ANALYSIS --output-file f.png": ("are both",),
    f"{EVAL} --report page.pdf": ("`page.pdf` is not a page of HTML",),
    f"{EVAL} --report PAGE": ("old.html` exists",),
    f"{EVAL} --report missing/page.html": ("no directory `missing`",),
    f"{EVAL} --report page.html --output-file page.html": ("are both `page.html`",),
    f"{EVAL} --report page.html --analysis OF_VIT": ("the analysis was made for another checkpoint",),
}
WRITERS = ("analyze SINGLE --data digits --limit 9 -o", f"{ROUTED} -o", "inspect SINGLE --output-file")
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


@pytest.mark.parametrize(("text", "fragments"), (OPTIONS | OUTPUTS).items())
def test_options(workshop, text, fragments, monkeypatch):
    monkeypatch.chdir(workshop.out)
    workshop.refuse(text, *fragments)


@pytest.mark.parametrize("words", [["prune"], ["prune", "x"], ["eval", "x"], ["analyze", "x", "-o", "y"], ["fit"]])
def test_calls_that_lack_something(run, words):
    result = run(*words)
    assert (result.code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


# --- outputs
def test_a_file_that_is_refused_later_leaves_the_old_output_alone(workshop):
    data = workshop.arrays(inputs=with_value(7, float("nan")))
    workshop.refuse("analyze SINGLE --data PATH -o OLD --force", "sample 7", path=data)
    assert (workshop.out / "old.safetensors").read_bytes() == b"keep me"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="this user can write anywhere")
def test_a_directory_that_cannot_be_written(workshop):
    workshop.out.chmod(0o555)
    try:
        for writer in WRITERS:
            workshop.refuse(f"{writer} NEW", "out", "permission")
    finally:
        workshop.out.chmod(0o755)


GOOD: dict[str, Make] = {
    **{f"eval SINGLE --data PATH  # {kind}": lambda w, kind=kind: w.arrays(kind) for kind in ARRAY_FILES},
    "eval SINGLE --data PATH": lambda w: w.folder("0/a.png", "1/b.png"),
    f"{EVAL} --limit 9 --baseline PATH": lambda w: w.with_tensors(),
    f"{EVAL} --limit 9 --baseline OTHER": lambda w: None,
    "eval PATH --data digits --limit 9": lambda w: w.with_metadata({"plan": {}}),
    f"{PRUNE} --analysis PATH": lambda w: w.with_metadata({}, w.analysis),
    f"{PRUNE} --analysis PATH --compensate lstsq": lambda w: w.outdated(inputs=INPUTS),
}


@pytest.mark.parametrize(("text", "make"), GOOD.items())
def test_the_workshop_makes_good_files_where_nothing_is_changed(workshop, text, make):
    """Else the tests above might be refused for another reason than the one they name."""
    result = workshop.run(*workshop.words(text.partition("#")[0], make(workshop)))
    assert result.code == 0, result.stderr


def test_a_plan_that_fits_is_read(workshop):
    """The plan that the cases above break, on a checkpoint with the tensors it asks for."""
    order = [3, 5, *(expert for expert in range(128) if expert not in (3, 5))]
    parts = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    kept = {f"{LAYER}.{part}": lambda tensor: tensor[[3, 5]] for part in parts}
    pruned = workshop.with_tensors(**{f"{LAYER}.phi": lambda tensor: tensor[:, order]}, **kept)
    path = workshop.with_metadata({"plan": {LAYER: PLAN}}, pruned)
    result = workshop.run("eval", path, "--data", "digits", "--limit", 9)
    assert result.code == 0, result.stderr
