"""How much faster pruned layers and models are than dense ones on the CPU, and than those of peers.

    python tests/benchmarks/latency.py

One thread, random weights, 1/8 of the experts: `static` with `renorm` and with `mean`, `input` with
`none` and with `mean`, `batch` with `none`. Repetitions of all variants are interleaved; ratios are
medians over repetitions. In brackets: the time as a multiple of the ideal, which is the dense layer's
time times the share of FLOPs that is left. Where the work is bound by computing (a batch of 8 or
more) it cannot be below 1; such a run was disturbed, and is done again.

The peers are the same layer of `soft-moe` and `soft-moe-pytorch`, and the whole ViT-S of `soft-moe`,
where these libraries are installed.
"""

import contextlib
import statistics
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from moeprune.evaluation.latency import interleaved
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.layers.surgery import Calibrated, prune_layer
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import LayerPlan
from moeprune.pruning.prune import prune

TOKENS = 196
INPUTS = 4
ATTEMPTS = 3
LAYERS = {
    "ViT-S, n 128, p 1": (SoftMoEConfig(384, 128, 1, 1536), (1, 8, 32)),
    "ViT-B, n 32, p 4": (SoftMoEConfig(768, 32, 4, 3072), (1, 8, 32)),
}
VIT_S_BATCHES = (1, 8)
PRUNED = (("static", "renorm"), ("static", "mean"), ("input", "none"), ("input", "mean"), ("batch", "none"))
VARIANTS = tuple(map(", ".join, PRUNED))

Seconds = dict[str, list[float]]


def installed(peers: dict[str, Callable[[], nn.Module]]) -> dict[str, nn.Module]:
    """Those that can be built: without ImportError."""
    found = {}
    for name, build in peers.items():
        with contextlib.suppress(ImportError):
            found[name] = build().eval()
    return found


def ratio(seconds: Seconds, slow: str, fast: str) -> float:
    """How many times as fast one is as the other."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def print_rows(name: str, batch: int, seconds: Seconds, of_ideal: float | None = None) -> None:
    """Markdown rows: what pruned variants gain over the dense one, and what all gain over each peer."""
    milliseconds = 1e3 * statistics.median(seconds["dense"])
    for base in ("dense", *(which for which in seconds if which not in ("dense", *VARIANTS))):
        cells = [name, str(batch), f"dense, {milliseconds:.1f} ms" if base == "dense" else base]
        cells.append("" if base == "dense" else f"{ratio(seconds, base, 'dense'):.2f}×")
        for which in VARIANTS:
            cell = f"{ratio(seconds, base, which):.2f}×" if which in seconds else ""
            if which == "static, renorm" and base == "dense" and of_ideal is not None:
                cell += f" ({of_ideal:.2f})"
            cells.append(cell)
        print("|", " | ".join(cells), "|", flush=True)


def measure_layer(name: str, config: SoftMoEConfig, batches: tuple[int, ...]) -> None:
    n, k = config.num_experts, config.num_experts // 8
    dense = SoftMoE(config).eval()
    means = torch.randn(n, config.slots_per_expert, config.dim)
    layers: dict[str, nn.Module] = {"dense": dense}
    for scope, compensation in PRUNED:
        plan = LayerPlan(scope, k, n, "combine", compensation, tuple(range(k)) if scope == "static" else None)
        layers[f"{scope}, {compensation}"] = prune_layer(dense, plan, Calibrated(None, means))
    d, p, h = config.dim, config.slots_per_expert, config.hidden_dim
    layers |= installed(
        {
            "soft-moe": lambda: import_module("soft_moe.soft_moe").SoftMoELayerWrapper(
                d, n, p, lambda: nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))
            ),
            "soft-moe-pytorch": lambda: import_module("soft_moe_pytorch").SoftMoE(
                d, num_experts=n, num_slots=p, expert_mult=h // d
            ),
        }
    )
    static = LayerPlan("static", k, n, "combine", "renorm", tuple(range(k)))
    share = config.flops(TOKENS, static).total / config.flops(TOKENS).total
    for batch in batches:
        inputs = [torch.randn(batch, TOKENS, config.dim) for _ in range(INPUTS)]
        for _ in range(ATTEMPTS):
            seconds = interleaved(layers, inputs)
            of_ideal = 1 / (share * ratio(seconds, "dense", "static, renorm"))
            if batch < 8 or of_ideal >= 1:
                break
        print_rows(name, batch, seconds, of_ideal)


def measure_vit_s() -> None:
    """Print the lines of a whole ViT-S whose last 6 of 12 blocks have a Soft MoE."""
    mlp = BlockConfig(mlp_dim=1536)
    moe = BlockConfig(soft_moe=SoftMoEConfig(384, 128, 1, 1536))
    blocks, token = (mlp,) * 6 + (moe,) * 6, {"class_token": True, "pooling": "token"}
    config = ViTConfig((224, 224), (16, 16), 3, 1000, 384, 6, blocks, **token)
    dense = SoftMoEViT(config).eval()
    models: dict[str, nn.Module] = {
        "dense": dense,
        "input, none": prune(dense, keep="1/8", scope="input", signal="combine", compensate="none"),
        "static, renorm": prune(dense, keep="1/8", signal="random", compensate="renorm"),
    }
    models |= installed({"soft-moe": lambda: import_module("soft_moe").soft_moe_vit_small(num_classes=1000)})
    for batch in VIT_S_BATCHES:
        inputs = [torch.randn(batch, 3, 224, 224) for _ in range(INPUTS)]
        print_rows("whole ViT-S", batch, interleaved(models, inputs))


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    print("|", " | ".join(["", "b", "over", "dense", *VARIANTS]), "|")
    print("|---|--:|---|" + "--:|" * (1 + len(VARIANTS)))
    for name, (config, batches) in LAYERS.items():
        measure_layer(name, config, batches)
    measure_vit_s()


if __name__ == "__main__":
    main()
