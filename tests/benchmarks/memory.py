"""How much of a routed checkpoint a process holds in memory, against the experts that inputs chose.

    python tests/benchmarks/memory.py

Writes a checkpoint of 1 GB (two Soft MoE layers of 128 experts, scope `input`, 1/8) into a temporary
folder, loads it in a process of its own and runs one input after another through it, on the CPU. The
weights are mapped from the file; `resident` is how many bytes of that map are in the process's memory.
Linux only (it reads /proc).
"""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

import moeprune
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.observation import Observation
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.vit import SoftMoEViT

MOE = SoftMoEConfig(dim=384, num_experts=128, slots_per_expert=1, hidden_dim=1280)
INPUTS = 12


def resident(path: str) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    is_mapping, total = False, 0
    with Path("/proc/self/smaps").open() as maps:
        for line in maps:
            if not line.split()[0].endswith(":"):
                is_mapping = line.rstrip().endswith(path)
            elif is_mapping and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


@torch.inference_mode()
def measure(path: str) -> None:
    """Print a row for each input."""
    model = moeprune.load(path)
    chosen: set[tuple[str, int]] = set()

    def observe(name: str, observation: Observation) -> None:
        chosen.update((name, expert) for expert in observation.chosen.flatten().tolist())

    for name, layer in model.moe_layers.items():
        layer.observer = partial(observe, name)
    expert = 2 * MOE.dim * MOE.hidden_dim * 4 / 1e6  # MB
    experts = len(model.moe_layers) * MOE.num_experts * expert
    print(f"checkpoint {Path(path).stat().st_size / 1e6:.0f} MB, of which {experts:.0f} experts")
    print(f"{'inputs':>6} {'different experts':>18} {'their weights':>14} {'resident':>10}")
    generator = torch.Generator().manual_seed(0)
    for count in range(INPUTS + 1):
        if count:
            model(torch.randn(1, 3, 224, 224, generator=generator))
        weights = len(chosen) * expert
        print(f"{count:6} {len(chosen):18} {weights:11.0f} MB {resident(path) / 1e6:7.0f} MB", flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    torch.manual_seed(0)
    blocks = (BlockConfig(mlp_dim=1536), *(BlockConfig(soft_moe=MOE),) * 2)
    model = SoftMoEViT(ViTConfig((224, 224), (16, 16), 3, 1000, MOE.dim, 6, blocks))
    for layer in model.moe_layers.values():
        layer.scale.data.fill_(16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "routed.safetensors"
        moeprune.save(moeprune.prune(model, keep="1/8", scope="input", signal="combine", compensate="none"), path)
        subprocess.run([sys.executable, __file__, path], check=True)


if __name__ == "__main__":
    main()
