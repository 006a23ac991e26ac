"""The time and memory that calibration takes, as a multiple of the forward pass of the same images.

    python tests/benchmarks/calibration.py [--images 512] [--only analyze|command|prune|large|growth]

- `analyze` and `prune`: in Python, on a ViT-S/16 at 224² of 123 M parameters whose last 6 of 12 blocks have a Soft MoE
  of 128 experts; all six layers are pruned to 1/8, by `--method` (`--method auto` gives no option at all).
- `command`: what `moeprune analyze` does, which also probes predictions, and reads and writes files.
- `large`: both in Python on a layer of 4,096 experts of width 192, with 64 images.
- `growth`: both on a small model, one of its sizes doubled at a time.

Weights are random, routers sharp, samples random and in memory. Each row is measured in a process of its own: the
forward pass before and after the call, of which the faster counts, and the peak of resident memory above that of the
model and the samples, in GB of 10⁹ bytes. Whatever takes less than two seconds is repeated, and the least time counts:
another program that runs meanwhile tends to raise the ratio; with `--cpu-time --threads 1` it hardly matters, as the
processor's time is counted. A process that would take more memory than `--memory-limit` ends, and its row says so.
Linux only (it reads /proc).
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

import moeprune
from moeprune.calibration.analysis import analyze_checkpoint
from moeprune.calibration.results import AnalyzeRequest
from moeprune.data.spec import DataSpec
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.request import ModelSpec
from moeprune.models.vit import SoftMoEViT

METHOD = ("scope=static", "signal=gram", "compensate=affine")
KEEP = "1/8"
RUNTIME = moeprune.Runtime(device="cpu", batch_size=64)
SCALE = 16.0  # of the routers: few experts matter to an input
REPEAT_BELOW = 2.0  # seconds
GROWTH = {"n": 32, "p": 1, "d": 64, "L": 2, "samples": 256}
HEADER = ("", "forward, s", "call, s", "ratio", "GB of forward", "GB of call", "GB in all")


class Case(NamedTuple):
    """One measurement: a call on a vision transformer of `dense` blocks with an MLP and `layers` with a Soft MoE."""

    call: str  # analyze, command or prune
    images: int
    side: int  # of an image, in pixels
    patch: int
    dim: int
    heads: int
    dense: int
    layers: int
    experts: int
    slots: int  # per expert
    hidden: int  # width of an expert
    method: tuple[str, ...] = ()


class Measured(NamedTuple):
    """Seconds, and bytes of resident memory: above the model after the forward pass and the call, and in all."""

    parameters: int
    forward: float
    call: float
    forward_bytes: int
    call_bytes: int
    peak: int


def vit_s(call: str, images: int, method: tuple[str, ...]) -> Case:
    return Case(call, images, 224, 16, 384, 6, 6, 6, 128, 1, 182, method)


def large(call: str, method: tuple[str, ...]) -> Case:
    return Case(call, 64, 64, 8, 192, 3, 1, 1, 4096, 1, 32, method)


def growth(call: str, sizes: dict[str, int], method: tuple[str, ...]) -> Case:
    n, p, d, layers, samples = (sizes[name] for name in ("n", "p", "d", "L", "samples"))
    return Case(call, samples, 32, 4, d, 4, 1, layers, n, p, 64, method)


def build(case: Case) -> SoftMoEViT:
    """The model of a case, with random weights and sharp routers."""
    torch.manual_seed(0)
    moe = BlockConfig(soft_moe=SoftMoEConfig(case.dim, case.experts, case.slots, case.hidden))
    blocks = (BlockConfig(mlp_dim=4 * case.dim),) * case.dense + (moe,) * case.layers
    sides = (case.side, case.side), (case.patch, case.patch)
    model = SoftMoEViT(ViTConfig(*sides, 3, 1000, case.dim, case.heads, blocks)).eval()
    for layer in model.moe_layers.values():
        layer.scale.data.fill_(SCALE)
    return model


def prepared(case: Case, model: SoftMoEViT, samples: Tensor, folder: Path) -> Callable[[], object]:
    """The call of a case; files that it reads are written to the folder."""
    if case.call == "analyze":
        return lambda: moeprune.analyze(model, samples, RUNTIME)
    if case.call == "prune":
        options: Any = dict(part.split("=") for part in case.method)
        return lambda: moeprune.prune(model, samples, keep=KEEP, runtime=RUNTIME, **options)
    checkpoint, data, output = (folder / f"{name}.safetensors" for name in ("model", "data", "analysis"))
    moeprune.save(model, checkpoint)
    save_file({"inputs": samples}, data)
    request = AnalyzeRequest(
        checkpoint=ModelSpec(path=checkpoint), data=DataSpec(spec=str(data)), output=output, overwrite=True,
        runtime=RUNTIME,
    )  # fmt: skip
    return lambda: analyze_checkpoint(request)


def resident(name: str) -> int:
    """Bytes of this process's resident memory: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Least time of a call, repeated until REPEAT_BELOW has passed."""
    times: list[float] = []
    while sum(times) < REPEAT_BELOW:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def measure(case: Case, clock: Callable[[], float]) -> Measured:
    """Measure a case in this process."""
    model = build(case)
    samples = torch.randn(case.images, 3, case.side, case.side, generator=torch.Generator().manual_seed(1))

    def forward() -> None:
        for inputs in samples.split(RUNTIME.batch_size):
            RUNTIME.forward(model, inputs)

    with tempfile.TemporaryDirectory() as folder:
        call = prepared(case, model, samples, Path(folder))
        before = resident("VmRSS")
        RUNTIME.forward(model, samples[: RUNTIME.batch_size])  # warm up
        first = seconds(forward, clock)
        forward_bytes = resident("VmHWM") - before
        taken = seconds(call, clock)
        peak = resident("VmHWM")
        again = seconds(forward, clock)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(parameters, min(first, again), taken, forward_bytes, peak - before, peak)


def measure_limited(case: Case, limit: float, cpu_time: bool) -> None:
    """Print what is measured as JSON, or a string that says why it cannot be; limit: GB of memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    try:
        print(json.dumps(measure(case, time.process_time if cpu_time else time.perf_counter)))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print(json.dumps(f"more than {limit:g} GB"))


def measure_apart(case: Case, limit: float, cpu_time: bool) -> Measured | str:
    """Measure a case in a process of its own; a string says why it cannot be."""
    command = [sys.executable, __file__, "--measure", json.dumps(case), "--memory-limit", str(limit)]
    command += ["--cpu-time"] if cpu_time else []
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode:
        return f"failed with exit code {child.returncode}"
    found = json.loads(child.stdout.splitlines()[-1])
    return found if isinstance(found, str) else Measured(*found)


def rows(only: str | None, images: int, method: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    """Yield the name and the case of each row."""
    for call in ("analyze", "command", "prune"):
        if only in (None, call):
            yield f"ViT-S, {images} images: {call}", vit_s(call, images, method)
    if only in (None, "large"):
        for call in ("analyze", "prune"):
            yield f"4,096 experts: {call}", large(call, method)
    if only in (None, "growth"):
        for call in ("analyze", "prune"):
            base = " ".join(f"{name}={size}" for name, size in GROWTH.items())
            yield f"{base}: {call}", growth(call, GROWTH, method)
            for name, size in GROWTH.items():
                yield f"{name}={2 * size}: {call}", growth(call, GROWTH | {name: 2 * size}, method)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=512, help="of the ViT-S")
    parser.add_argument("--only", choices=("analyze", "command", "prune", "large", "growth"))
    parser.add_argument("--method", nargs="+", default=METHOD, help="options of `prune`, or `auto` for none")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time, not the clock's")
    parser.add_argument("--memory-limit", type=float, default=12.0, help="of each process, in GB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_limited(Case(*json.loads(options.measure)), options.memory_limit, options.cpu_time)
        return
    method = () if options.method == ["auto"] else tuple(options.method)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes to come
    threads = options.threads or torch.get_num_threads()
    clock = "CPU time" if options.cpu_time else "wall time"
    print(f"torch {torch.__version__}, {threads} thread(s), {clock}, prune: {' '.join(method) or 'auto'}\n")
    print("|", " | ".join(HEADER), "|")
    print("|---|" + "--:|" * (len(HEADER) - 1))
    for name, case in rows(options.only, options.images, method):
        found = measure_apart(case, options.memory_limit, options.cpu_time)
        if isinstance(found, str):
            print(f"| {name} | {found}", "| " * len(HEADER[2:]), "|", flush=True)
            continue
        ratio = f"{found.call / found.forward:.1f}×"
        memory = (f"{size / 1e9:.2f}" for size in found[3:])
        print("|", " | ".join([name, f"{found.forward:.2f}", f"{found.call:.2f}", ratio, *memory]), "|", flush=True)


if __name__ == "__main__":
    main()
