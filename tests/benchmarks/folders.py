"""How long pruning a folder of transformers takes, as a multiple of `cp`, and how much memory.

    python tests/benchmarks/folders.py

Writes two folders of random bytes into a temporary folder: one of 2 GB in five shards, and one with as many tensors as
DeepSeek-V3 has (90 thousand, each small). Prunes each to 1/4 and 1/2 of the experts and copies the result with `cp`,
both until the bytes are on the disk. Medians of 5 interleaved repetitions; the memory is the peak above what the
imports take, in a process of its own. Linux only (it reads /proc).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moeprune.files.checkpoint import write
from moeprune.models.request import ModelSpec
from moeprune.pruning.checkpoint import prune_checkpoint
from moeprune.pruning.request import PruneRequest

REPETITIONS = 5
KEEPS = ("1/4", "1/2")
SIZES = {"few large tensors": (6, 64, 768, 1152, 5), "many small tensors": (58, 512, 16, 8, 16)}
"""Layers, experts, width, width of an expert, shards."""


def make(folder: Path, layers: int, experts: int, d: int, h: int, shards: int) -> None:
    """A folder of one kind of layer with experts of their own tensors."""
    folder.mkdir()
    config = {"model_type": "qwen3_moe", "num_experts": experts, "num_experts_per_tok": 8, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (4096, d)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp"
        shapes[f"{prefix}.gate.weight"] = (experts, d)
        for j in range(experts):
            for name, shape in {"gate_proj": (h, d), "up_proj": (h, d), "down_proj": (d, h)}.items():
                shapes[f"{prefix}.experts.{j}.{name}.weight"] = shape
    names, weight_map = list(shapes), {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        write(folder / file, {name: torch.rand(shapes[name]).bfloat16() for name in part}, None)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def prune(folder: Path, target: Path, keep: str) -> None:
    how = {"keep": keep, "signal": "random", "compensate": "renorm"}
    prune_checkpoint(PruneRequest(checkpoint=ModelSpec(path=folder), output=target, overwrite=True, **how))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    """`cp`, and then wait for the disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())


def high_water() -> int:
    """The most bytes of memory that this process has held; `ru_maxrss` counts those of its parent too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak(folder: Path, target: Path, keep: str) -> None:
    """Print the peak memory above the imports, which pruning a small folder completes, in MB."""
    make(target.with_name("tiny"), 1, 8, 8, 8, 1)
    prune(target.with_name("tiny"), target.with_name("tiny pruned"), "8")
    before = high_water()
    prune(folder, target, keep)
    print(f"{(high_water() - before) / 1e6:.0f}")


def main() -> None:
    if len(sys.argv) > 1:
        peak(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
        return
    for what, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            folder, target, copied = (Path(name) / each for each in ("full", "pruned", "copied"))
            torch.manual_seed(0)
            make(folder, *sizes)
            total = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{what}: {3 * sizes[0] * sizes[1]:,} of experts, {total / 1e9:.2f} GB")
            for keep in KEEPS:
                pruning, copying = [], []
                for _ in range(REPETITIONS):
                    for each in (target, copied):
                        subprocess.run(["rm", "-rf", each], check=True)
                    os.sync()
                    pruning.append(seconds(lambda: prune(folder, target, keep)))  # noqa: B023
                    os.sync()
                    copying.append(seconds(lambda: copy(target, copied)))  # noqa: B023
                ratio = statistics.median(a / b for a, b in zip(pruning, copying, strict=True))
                with tempfile.TemporaryDirectory(dir=name) as other:
                    call = [sys.executable, __file__, folder, Path(other) / "pruned", keep]
                    memory = subprocess.check_output(call, text=True)
                print(
                    f"keep {keep}: {statistics.median(pruning):.2f} s, {ratio:.2f} times `cp` of the result;"
                    f" peak memory above the imports {memory.strip()} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
