"""How much faster pruned layers are than dense ones on a GPU, and how near to what it can do at best.

    python tests/benchmarks/gpu.py [float32]

Layers of the sizes of ViT-S, -B and -L with random weights in bfloat16 (or float32), 196 tokens, 128
slots in all, 1/8 of the experts: `static` with `renorm`, `input` and `batch` with `none`. Times are of
CUDA graphs, which leave out what launching kernels from Python costs, with a cold cache; `eager` is the
same call without a graph. Repetitions of all variants are interleaved; figures are medians.

`of roofline` is the share of the time that is left if all is perfect: the bytes of the weights that are
touched and of the tokens at the card's own copy speed, or the FLOPs at that of a large matrix product,
whichever takes longer.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.observation import Observation
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import prune_layer
from moeprune.plan import LayerPlan

TOKENS, SLOTS = 196, 128
SIZES = {"ViT-S": (384, 1536), "ViT-B": (768, 3072), "ViT-L": (1024, 4096)}
EXPERTS = (128, 32)
BATCHES = (1, 8, 64, 256)
REPETITIONS = 15


def microseconds(calls: dict[str, Callable[[], object]], from_idle: bool = False) -> dict[str, float]:
    """Median time of each call on the GPU with a cold cache; from_idle: it waits for the host's launches."""
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for repetition in range(-2, REPETITIONS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cold.zero_()
            if from_idle:
                torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            if repetition >= 0:
                events[name].append((start, end))
    torch.cuda.synchronize()
    spent = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
    return {name: 1e3 * statistics.median(milliseconds) for name, milliseconds in spent.items()}


def graph_of(layer: SoftMoE, x: Tensor) -> torch.cuda.CUDAGraph:
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x)
    return graph


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and FLOPs per microsecond that this card reaches."""
    source = torch.randn(1 << 29, device="cuda").to(dtype)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    took = microseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return 2 * source.nbytes / took["copy"], 2 * 8192**3 / took["product"]


def roofline(layer: SoftMoE, x: Tensor, ceiling: tuple[float, float]) -> float:
    """The microseconds of a perfect forward pass."""
    seen: list[Observation] = []
    layer.observer = seen.append
    layer(x)
    layer.observer = None
    chosen, config = seen[0].chosen, layer.config
    touched = len(layer.fc2_weight) if chosen is None else len(chosen.unique())
    size = 2 * touched * config.dim * config.hidden_dim * x.element_size() + 2 * x.nbytes
    return max(size / ceiling[0], len(x) * config.flops(TOKENS, layer.plan).total / ceiling[1])


@torch.inference_mode()
def main() -> None:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[(sys.argv[1:] or ["bfloat16"])[0]]
    ceiling = ceilings(dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}")
    print(f"copy {ceiling[0] / 1e6:.2f} TB/s, matrix product {ceiling[1] / 1e6:.0f} TFLOP/s\n")
    pruned = ("static", "input", "batch")
    columns = ["layer", "n", "b", "dense, µs", *pruned, "of roofline: dense", *pruned, "eager: static"]
    columns += pruned[1:]
    print("|", " | ".join(columns), "|")
    print("|---|" + "--:|" * (len(columns) - 1))
    for size, (d, h) in SIZES.items():
        for n in EXPERTS:
            k, config = n // 8, SoftMoEConfig(d, n, SLOTS // n, h)
            dense = SoftMoE(config).cuda().to(dtype).requires_grad_(False).eval()
            plans = {
                "static": LayerPlan("static", k, n, "combine", "renorm", tuple(range(k))),
                "input": LayerPlan("input", k, n, "combine", "none"),
                "batch": LayerPlan("batch", k, n, "combine", "none"),
            }
            layers = {"dense": dense} | {name: prune_layer(dense, plan) for name, plan in plans.items()}
            for b in BATCHES:
                x = torch.randn(b, TOKENS, d, device="cuda").to(dtype)
                took = microseconds({name: graph_of(layer, x).replay for name, layer in layers.items()})
                eager = microseconds({name: partial(layer, x) for name, layer in layers.items()}, from_idle=True)
                shares = (roofline(layer, x, ceiling) / took[name] for name, layer in layers.items())
                cells = [size, str(n), str(b), f"{took['dense']:.0f}"]
                cells += [f"{took['dense'] / took[name]:.1f}×" for name in pruned]
                cells += [f"{100 * share:.0f} %" for share in shares]
                cells += [f"{eager['dense'] / eager[name]:.1f}×" for name in pruned]
                print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
