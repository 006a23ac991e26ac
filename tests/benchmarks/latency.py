"""How much faster a routed layer is than a dense one, and than that of the library `soft-moe`, if installed.

    python tests/benchmarks/latency.py

Scope `input`, 1/8 of the experts, on the CPU with one thread, random weights and random inputs.
Repetitions of all variants are interleaved; the ratios are medians over repetitions.
"""

from __future__ import annotations

import statistics

import torch
from torch import nn

from moeprune.architecture import SoftMoEConfig
from moeprune.latency import interleaved
from moeprune.plan import LayerPlan
from moeprune.pruning import prune_layer
from moeprune.soft_moe import SoftMoE

LAYERS = {
    "ViT-S layer, n = 128, p = 1": (SoftMoEConfig(384, 128, 1, 1536), (1, 8, 32)),
    "ViT-B layer, n = 32, p = 4": (SoftMoEConfig(768, 32, 4, 3072), (32,)),
}
TOKENS = 196
INPUTS = 4


def peer(config: SoftMoEConfig) -> nn.Module | None:
    """The same layer of bwconrad's soft-moe, or None where it is not installed."""
    try:
        from soft_moe.soft_moe import SoftMoELayerWrapper
    except ImportError:
        return None

    def expert() -> nn.Module:
        d, h = config.dim, config.hidden_dim
        return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))

    return SoftMoELayerWrapper(config.dim, config.num_experts, config.slots_per_expert, expert).eval()


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    print(f"{'layer':28} {'batch':>5} {'dense':>10} {'routed':>10} {'+ mean':>10}", end=" ")
    print(f"{'dense/routed':>13} {'dense/mean':>11} {'peer/dense':>11} {'peer/routed':>12}")
    for name, (config, batches) in LAYERS.items():
        n, k = config.num_experts, config.num_experts // 8
        dense = SoftMoE(config).eval()
        means = torch.randn(n, config.slots_per_expert, config.dim)
        layers: dict[str, nn.Module | None] = {
            "dense": dense,
            "routed": prune_layer(dense, LayerPlan("input", k, n, "combine", "none"), None),
            "mean": prune_layer(dense, LayerPlan("input", k, n, "combine", "mean"), None, means),
            "peer": peer(config),
        }
        for batch in batches:
            tokens = [torch.randn(batch, TOKENS, config.dim) for _ in range(INPUTS)]
            there = {which: layer for which, layer in layers.items() if layer is not None}
            seconds = interleaved(there, tokens)
            line = f"{name:28} {batch:5}"
            for which in ("dense", "routed", "mean"):
                line += f" {1e3 * statistics.median(seconds[which]):7.1f} ms"
            line += f" {ratio(seconds, 'dense', 'routed'):12.2f}× {ratio(seconds, 'dense', 'mean'):10.2f}×"
            if "peer" in seconds:
                line += f" {ratio(seconds, 'peer', 'dense'):10.2f}× {ratio(seconds, 'peer', 'routed'):11.2f}×"
            print(line, flush=True)


if __name__ == "__main__":
    main()
