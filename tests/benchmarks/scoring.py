"""What scoring and choosing experts costs, as a share of the dense forward pass that it is part of.

    python tests/benchmarks/scoring.py

Rows: the two shipped checkpoints on their test split, and one layer of the size of a ViT-S. Scoring is
the combine mass of every expert, choosing takes the best k = n/8 by it (Algorithm 1 without running
experts). Both happen inside the forward pass, where a routed layer does them; their time is taken
there. Medians over repetitions on one thread.
"""

import statistics
import time

import torch
from common import shipped, test_set
from torch import Tensor, nn

from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.experts import combine_mass, top_k
from moeprune.layers.observation import Observation
from moeprune.layers.soft_moe import SoftMoE

REPETITIONS = 51


def shares(model: nn.Module, inputs: Tensor) -> tuple[float, float, float]:
    """Seconds of a dense forward pass, and what scoring and choosing cost as shares of it."""
    spent = [0.0, 0.0]

    def score_and_choose(observation: Observation) -> None:
        start = time.perf_counter()
        mass = combine_mass(observation.weights)
        scored = time.perf_counter()
        top_k(mass, mass.shape[1] // 8)
        spent[0] += scored - start
        spent[1] += time.perf_counter() - scored

    for layer in model.modules():
        if isinstance(layer, SoftMoE):
            layer.observer = score_and_choose
    rows = []
    for _ in range(REPETITIONS):
        spent[:] = 0, 0
        start = time.perf_counter()
        model(inputs)
        dense = time.perf_counter() - start - sum(spent)
        rows.append((dense, spent[0] / dense, spent[1] / dense))
    seconds, scoring, choosing = (statistics.median(column) for column in zip(*rows, strict=True))
    return seconds, scoring, choosing


def main() -> None:
    torch.set_num_threads(1)
    cases: list[tuple[str, nn.Module, Tensor]] = []
    for name in ("single", "vit"):
        model = shipped(name)
        dataset = test_set(model)
        cases += [(name, model, next(dataset.batches(batch))[0]) for batch in (1, 64, 256)]
    layer = SoftMoE(SoftMoEConfig(384, 128, 1, 1536))
    cases += [("ViT-S layer, n = 128", layer, torch.randn(batch, 196, 384)) for batch in (1, 8, 32)]
    print(f"{'model':22} {'batch':>5} {'forward':>11} {'scoring':>8} {'choosing':>9}")
    with torch.inference_mode():
        for name, module, inputs in cases:
            seconds, scoring, choosing = shares(module, inputs)
            print(f"{name:22} {len(inputs):5} {1e3 * seconds:8.2f} ms {scoring:8.2%} {choosing:9.2%}")


if __name__ == "__main__":
    main()
