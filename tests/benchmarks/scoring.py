"""What scoring and choosing experts costs, as a share of a dense forward pass in the same run.

    python tests/benchmarks/scoring.py

Rows: the two shipped checkpoints on their test split, and one layer of the size of a ViT-S. Scoring is
the combine mass of every expert, choosing takes the best k = n/8 by it (Algorithm 1 without running
experts). Medians of interleaved repetitions on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

import moeprune
from moeprune.architecture import SoftMoEConfig
from moeprune.calibration import observe_layers
from moeprune.model import soft_moe_layers
from moeprune.scores import combine_mass, top_k
from moeprune.soft_moe import Observation, SoftMoE

REPETITIONS = 31


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(name: str, batch: int, forward: Callable[[], object], weights: list[torch.Tensor]) -> None:
    masses = [combine_mass(combine_weights) for combine_weights in weights]

    def score() -> None:
        for combine_weights in weights:
            combine_mass(combine_weights)

    def choose() -> None:
        for mass in masses:
            top_k(mass, mass.shape[1] // 8)

    tasks = (forward, score, choose)
    for task in tasks:
        task()
    times = [[seconds(task) for task in tasks] for _ in range(REPETITIONS)]
    dense = statistics.median(row[0] for row in times)
    scoring, choosing = (statistics.median(row[column] / row[0] for row in times) for column in (1, 2))
    print(f"{name:28} {batch:5} {1e3 * dense:12.3f} {scoring:9.2%} {choosing:9.2%}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'model':28} {'batch':>5} {'forward, ms':>12} {'scoring':>9} {'choosing':>9}")
    for name, data in (("single", "digits:test"), ("vit", "pairs:test")):
        path = Path(str(resources.files("moeprune"))) / "checkpoints" / f"{name}.safetensors"
        model = moeprune.load(path)
        dataset = moeprune.open_data(data, model.input_format)
        for batch in (1, 32, 256):
            inputs, _ = next(dataset.batches(batch))
            weights: list[torch.Tensor] = []

            def keep(_: str, observation: Observation, weights: list[torch.Tensor] = weights) -> None:
                weights.append(observation.combine_weights)

            observe_layers(model, list(soft_moe_layers(model)), keep, inputs, moeprune.Runtime(device="cpu"))
            with torch.inference_mode():
                report(name, batch, lambda model=model, inputs=inputs: model(inputs), weights)
    layer = SoftMoE(SoftMoEConfig(384, 128, 1, 1536))
    layer.reset_parameters()
    observed: list[Observation] = []
    for batch in (1, 8, 32):
        tokens = torch.randn(batch, 196, 384)
        with torch.inference_mode():
            layer.observer = observed.append
            layer(tokens)
            layer.observer = None
            report(
                "ViT-S layer, n = 128",
                batch,
                lambda tokens=tokens: layer(tokens),
                [observed[-1].combine_weights],
            )


if __name__ == "__main__":
    main()
