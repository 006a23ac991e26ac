"""How long static pruning from file to file takes, as a multiple of `cp`, and how much memory.

    python tests/benchmarks/streaming.py

Writes a checkpoint of 2 GB into a temporary folder (three Soft MoE layers of 128 experts), prunes it to
1/8, 1/2 and all of the experts, and copies the result and the full checkpoint with `cp`, all until the bytes
are on the disk. All bytes of the full checkpoint are read and hashed, whatever is kept of them. Medians of 5
interleaved repetitions; the memory is the peak above what the imports take, in a process of its own.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.request import ModelSpec
from moeprune.models.vit import SoftMoEViT
from moeprune.pruning.checkpoint import prune_checkpoint
from moeprune.pruning.request import PruneRequest

REPETITIONS = 5
KEEPS = ("1/8", "1/2", "1/1")


def prune(path: Path, target: Path, keep: str) -> None:
    how = {"keep": keep, "signal": "random", "compensate": "none"}
    prune_checkpoint(PruneRequest(checkpoint=ModelSpec(path=path), output=target, overwrite=True, **how))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy(source: Path, target: Path) -> None:
    """`cp`, and then wait for the disk."""
    subprocess.run(["cp", source, target], check=True)
    with target.open("rb+") as file:
        os.fsync(file.fileno())


def peak(path: Path, target: Path, keep: str) -> None:
    """Print the peak memory above the imports, which the first call completes, in MB."""
    prune(path, target.with_name("small.safetensors"), "1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prune(path, target, keep)
    print(f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6:.0f}")


def main() -> None:
    if len(sys.argv) > 1:
        peak(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
        return
    with tempfile.TemporaryDirectory() as folder:
        path, target, copied = (Path(folder) / f"{name}.safetensors" for name in ("full", "pruned", "copied"))
        torch.manual_seed(0)
        moe = BlockConfig(soft_moe=SoftMoEConfig(384, 128, 1, 1680))
        model = SoftMoEViT(ViTConfig((224, 224), (16, 16), 3, 1000, 384, 6, (moe,) * 3))
        moeprune.save(model, path)
        del model
        print(f"checkpoint of {path.stat().st_size / 1e9:.2f} GB")
        for keep in KEEPS:
            pruning, copying, copying_all = [], [], []
            for _ in range(REPETITIONS):
                for file in (target, copied):
                    file.unlink(missing_ok=True)
                os.sync()
                pruning.append(seconds(lambda: prune(path, target, keep)))  # noqa: B023
                copying.append(seconds(lambda: copy(target, copied)))
                copied.unlink()
                os.sync()
                copying_all.append(seconds(lambda: copy(path, copied)))
            ratio = statistics.median(a / b for a, b in zip(pruning, copying, strict=True))
            ratio_all = statistics.median(a / b for a, b in zip(pruning, copying_all, strict=True))
            memory = subprocess.check_output([sys.executable, __file__, path, target, keep], text=True)
            print(
                f"keep {keep}: {target.stat().st_size / 1e9:.2f} GB in {statistics.median(pruning):.2f} s,"
                f" {ratio:.2f} times `cp` of the result, {ratio_all:.2f} times `cp` of the full checkpoint;"
                f" peak memory above the imports {memory.strip()} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
