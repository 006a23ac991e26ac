"""Small good files of every kind that the tool reads, for tests that damage them or write beside them."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

import moeprune
from moeprune.data.preprocessing import Preprocessing
from moeprune.demo.train import initialize
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.description import Details
from moeprune.models.vit import SoftMoEViT
from tests.endings import complaint


def some_slow(cases: Iterable[Any], arguments: int = 1) -> list[Any]:
    """Every third case as it is, the others marked slow; arguments: that a case consists of."""
    parts = [(case,) if arguments == 1 else tuple(case) for case in cases]
    return [pytest.param(*part, marks=[pytest.mark.slow] if index % 3 else []) for index, part in enumerate(parts)]


SAMPLES = 12
SOURCE_ARGS = "--source-arg num_heads=2 --source-arg global_pool=avg"
"""What the foreign files do not tell."""
DENSE, DATA = "@dense.safetensors", "--data @data.npz"
PAPER = "--scope input --signal combine --compensate none"
"""The paper's rule, which needs no data."""
STATIC = "--signal combine --compensate none"
"""What needs an analysis alone, no pass over data."""
READERS = {
    "inspect": (".safetensors", "inspect PATH"),
    "analyze": (".safetensors", f"analyze PATH {DATA} -o NEW"),
    "prune": (".safetensors", f"prune PATH --keep 2 {PAPER} -o NEW"),
    "prune --analysis": (".safetensors", f"prune {DENSE} --keep 2 {STATIC} --analysis PATH -o NEW"),
    "prune --plan": (".json", f"prune {DENSE} --plan PATH -o NEW"),
    "prune --plan of a checkpoint": (".safetensors", f"prune {DENSE} --plan PATH -o NEW"),
    "eval": (".safetensors", f"eval PATH {DATA}"),
    "eval --baseline": (".safetensors", f"eval {DENSE} {DATA} --baseline PATH"),
    "eval --analysis": (".safetensors", f"eval {DENSE} {DATA} --sweep 1/2 --analysis PATH"),
    "eval --data array": (".npz", f"eval {DENSE} --data PATH"),
    "eval --data tensors": (".safetensors", f"eval {DENSE} --data PATH"),
    "eval --data another": ("", f"eval {DENSE} --data PATH"),
    "inspect torch": (".pt", "inspect PATH"),
    "inspect index": (".safetensors.index.json", "inspect PATH"),
    "inspect own model": (".pt", "inspect PATH --model os:getcwd --input-shape 1,8,8"),
    "export": (".safetensors", "export PATH --to soft-moe -o NEW"),
}
"""Every way in which a command reads a file: its suffix, and the command."""
WRITERS = {
    "inspect report": (".json", f"inspect {DENSE} --output-file PATH"),
    "analyze": (".safetensors", f"analyze {DENSE} {DATA} -o PATH"),
    "analyze report": (".txt", f"analyze {DENSE} {DATA} -o OLD --output-file PATH"),
    "prune from file to file": (".safetensors", f"prune {DENSE} --keep 2 --signal random --compensate none -o PATH"),
    "prune in memory": (".safetensors", f"prune {DENSE} --keep 2 {PAPER} -o PATH"),
    "prune with a fit": (".safetensors", f"prune {DENSE} {DATA} --keep 2 --compensate lstsq -o PATH"),
    "prune within a drop": (
        ".safetensors",
        f"prune {DENSE} --data digits --limit 60 --max-accuracy-drop 0.99 --signal combine --compensate mean -o PATH",
    ),
    "save a plan": (".json", f"prune {DENSE} --keep 2 {PAPER} --save-plan PATH"),
    "prune foreign": (
        ".safetensors", f"prune @foreign.safetensors {SOURCE_ARGS} --keep 2 --signal random --compensate none -o PATH",
    ),
    "export": (".safetensors", f"export {DENSE} --to soft-moe -o PATH"),
    "export to a torch file": (".pt", f"export {DENSE} --to soft-moe -o PATH"),
    "eval report": (".json", f"eval {DENSE} {DATA} --output-file PATH"),
    "plot": (".svg", f"eval {DENSE} {DATA} --analysis @analysis.safetensors --sweep 1/2 --quiet --plot PATH"),
}  # fmt: skip
"""Every way in which a command writes a file: its suffix, and the command."""
NEEDS = {"plot": "matplotlib", "prune within a drop": "sklearn"}
LAYER = "blocks.1.soft_moe"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FACTORY = "fuzzed_model:build"
FACTORY_CODE = """
import torch
from soft_moe_pytorch import SoftMoE

class Tower(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = torch.nn.Conv2d(1, width, 4, 4)
        self.layer = SoftMoE(width, num_slots=2, num_experts=4, expert_mult=2)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).flatten(2).mean(2))

def build(width=8):
    torch.manual_seed(0)
    return Tower(width)
"""


@dataclass
class Stock:
    """Good files of every kind, each in a folder of its own, made once; `out` is what commands may write."""

    root: Path
    run: Callable[..., Any]

    @property
    def output(self) -> Path:
        """A file that is there already."""
        return self.root / "out" / "old.safetensors"

    @property
    def new(self) -> Path:
        """A file that is not there yet."""
        return self.root / "out" / "new.safetensors"

    @property
    def dense_and_data(self) -> tuple[object, ...]:
        """A checkpoint, and the option that names data for it."""
        return self.path("dense.safetensors"), "--data", self.path("data.npz")

    def make(self, *words: object) -> None:
        result = self.run(*words)
        assert result.code == 0, (words, result.stderr)

    def complaint(self, words: list[object], *named: str) -> str | None:
        """What is wrong with how a command ends; the outputs are as before afterwards."""
        found = complaint(self.run, words, self.root / "out", *named)
        self.output.write_bytes(b"old")
        return found

    def command(self, text: str, path: Path | None = None) -> list[object]:
        """The words of a command line: `@NAME` is a file of the stock, `OLD` and `NEW` are outputs.

        Args:
            path: in place of `PATH`.
        """
        places = {"OLD": self.output, "NEW": self.new, "PATH": path}
        words = text.split()
        return [self.path(word[1:]) if word.startswith("@") else places.get(word, word) for word in words]

    def path(self, kind: str) -> Path:
        return self.root / kind


def make_stock(root: Path, run: Callable[..., Any]) -> Stock:
    stock = Stock(root, run)
    for folder in ("out", "shards", "images", "code", "empty"):
        (root / folder).mkdir()
    stock.output.write_bytes(b"old")
    blocks = BlockConfig(mlp_dim=16), BlockConfig(soft_moe=SoftMoEConfig(8, 4, 1, 16))
    config = ViTConfig((8, 8), (4, 4), 1, 10, dim=8, num_heads=2, blocks=blocks, final_norm=False, head_norm=True)
    details = Details(Preprocessing(mean=(0.3,), std=(0.4,)), {"library": "moeprune"}, {"training": {"seed": 0}})
    model = SoftMoEViT(config, details=details)
    initialize(model, 5.0, 1.0, torch.Generator().manual_seed(0))
    dense, analysis = stock.path("dense.safetensors"), stock.path("analysis.safetensors")
    moeprune.save(model.eval(), dense)
    inputs = np.random.default_rng(0).random((SAMPLES, 1, 8, 8), dtype=np.float32)
    arrays = {"inputs": inputs, "labels": np.arange(SAMPLES) % 10}
    np.savez(stock.path("data.npz"), **arrays)
    np.savez_compressed(stock.path("packed.npz"), **arrays)
    save_arrays(arrays, stock.path("data.safetensors"))
    stock.make("analyze", dense, "--data", stock.path("data.npz"), "-o", analysis)
    for name, *ways in (
        ("static", "--signal", "combine", "--compensate", "affine"),
        ("routed", "--scope", "input", "--signal", "deviation", "--compensate", "mean"),
    ):
        output = stock.path(f"{name}.safetensors")
        stock.make("prune", dense, "--analysis", analysis, "--keep", 2, *ways, "-o", output)
    words = "prune", dense, "--analysis", analysis, "--keep", 2, "--signal", "combine", "--compensate", "mean"
    stock.make(*words, "--save-plan", stock.path("plan.json"), "-o", stock.path("mean.safetensors"))
    stock.make(*words[:-1], "merge", "--save-plan", stock.path("merge.json"), "-o", stock.path("merged.safetensors"))
    stock.make(*words[:-1], "low-rank", "--rank", 1, "-o", stock.path("mapped.safetensors"))
    layer = {"k": 2, "compensation": "affine", "rank": 2}
    stock.path("rank.json").write_text(json.dumps({"schema_version": 1, "plan": {LAYER: layer}}))
    stock.make(
        "prune", dense, "--plan", stock.path("rank.json"), "--analysis", analysis,
        "--save-plan", stock.path("narrow.json"), "-o", stock.path("narrowed.safetensors"),
    )  # fmt: skip
    foreign = stock.path("foreign.safetensors")
    moeprune.export(model, foreign, "soft-moe")
    tensors = load_file(foreign)
    torch.save({"model": tensors, "epoch": 3}, stock.path("foreign.pt"))
    torch.save(tensors, stock.path("legacy.pt"), _use_new_zipfile_serialization=False)
    save_shards(root / "shards", tensors)
    return stock


ARRAY_FILES = {
    "npz": np.savez,
    "compressed": np.savez_compressed,
    "safetensors": lambda path, **arrays: save_arrays(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, path
    ),
}


def write_arrays(kind: str, path: Path, arrays: dict[str, Any]) -> Path:
    """Write arrays as a kind of ARRAY_FILES, under a path without its suffix; where they are."""
    path = path.with_name(f"{path.name}.{'npz' if kind == 'compressed' else kind}")
    ARRAY_FILES[kind](path, **arrays)
    return path


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Two shards and their index, whose path is returned; `changes` replace entries of the index."""
    names, half = list(tensors), len(tensors) // 2
    shards = dict(zip(SHARDS, (names[:half], names[half:]), strict=True))
    for shard, held in shards.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: shard for shard, held in shards.items() for name in held},
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index | changes))
    return path


def add_images(stock: Stock) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 12), dtype=np.uint8)
    for label in range(10):
        folder = stock.path("images") / str(label)
        folder.mkdir()
        image.fromarray(pixels[label]).save(folder / f"a.{'png' if label % 2 else 'jpg'}")


def add_adopted(stock: Stock) -> None:
    pytest.importorskip("soft_moe_pytorch")
    (stock.path("code") / "fuzzed_model.py").write_text(FACTORY_CODE)
    sys.path.insert(0, str(stock.path("code")))
    import fuzzed_model

    save_file(fuzzed_model.build().state_dict(), stock.path("own.safetensors"))
    model = moeprune.load(stock.path("own.safetensors"), FACTORY, input_shape=(1, 8, 8))
    moeprune.save(model, stock.path("adopted.safetensors"))
