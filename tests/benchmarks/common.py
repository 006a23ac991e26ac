"""What the benchmarks of methods share: data drawn anew for each seed, the models, and tables.

Calibration sets of the digits are 300 of the 358 images of the split, of the pairs 2,000 pairs of the same
358 images; what is drawn is the seed's. Results are on the whole test split, as a share of the full model's
accuracy there.
"""

import random
import statistics
from collections.abc import Iterable, Sequence
from fractions import Fraction
from importlib import resources

import torch
from torch import Tensor

import moeprune
from moeprune.amounts import parse_keep
from moeprune.data.datasets import Dataset, digits, from_tensors
from moeprune.demo.train import Recipe, train
from moeprune.evaluation.evaluate import predict
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.model import Model
from moeprune.models.vit import SoftMoEViT
from moeprune.plan import Method as Way
from moeprune.plan import uniform_plan

SEEDS = (0, 1, 2)
KEEPS = ("1/32", "1/16", "1/8", "1/4")
RUNTIME = moeprune.Runtime(device="auto", batch_size=200)
PAIRS = 2000
DIGITS = 300
KEEPING = ("auto", "renorm", "renorm-refit", "merge")  # compensations that need a kept expert, or choose one


def shipped(name: str) -> SoftMoEViT:
    """One of the two demo checkpoints, `single` or `vit`."""
    model = moeprune.load(str(resources.files("moeprune.demo") / "checkpoints" / f"{name}.safetensors"))
    assert isinstance(model, SoftMoEViT)
    return model


def without_residuals(
    widths: Sequence[tuple[int, int]], steps: int, position: float = 0.02, noise: float = 0.0
) -> SoftMoEViT:
    """A vision transformer on pairs of digits whose Soft MoE layers have no residual around them.

    What a layer gives is all that goes on: nothing hides what pruning breaks.

    Args:
        widths: for each Soft MoE layer its experts and their hidden width; a block with an MLP comes first.
        position: standard deviation of the first position embeddings.
        noise: standard deviation of what is added to normalised pixels while training.
    """
    blocks = [BlockConfig(mlp_dim=128)]
    for experts, hidden in widths:
        soft_moe = SoftMoEConfig(64, experts, slots_per_expert=1, hidden_dim=hidden)
        blocks.append(BlockConfig(soft_moe=soft_moe, residual=False))
    config = ViTConfig((8, 16), (2, 2), 1, 100, dim=64, num_heads=4, blocks=tuple(blocks))
    rates = {"learning_rate": 2e-3, "weight_decay": 0.01, "label_smoothing": 0.0}
    return train(Recipe(config, steps, scale=8.0, position=position, noise=noise, **rates))


def calibration(model: Model, seed: int) -> Dataset:
    """A calibration set drawn with a seed: digits, or pairs where the model takes them."""
    images, labels = digits("calibration")
    generator = random.Random(1000 + seed)
    if model.input_format.width == 8:
        chosen = sorted(generator.sample(range(len(images)), DIGITS))
        return in_memory(model, images[chosen], labels[chosen])
    left, right = ([generator.randrange(len(images)) for _ in range(PAIRS)] for _ in range(2))
    pixels = torch.cat([images[left], images[right]], dim=3)
    return in_memory(model, pixels, 10 * labels[left] + labels[right])


def in_memory(model: Model, pixels: Tensor, labels: Tensor) -> Dataset:
    """Pixels (n,1,h,w) in 0…1 and labels (n) as a data set for a model."""
    form = model.input_format
    return from_tensors("drawn", form.normalize(pixels), labels, form.classes)


def test_set(model: Model) -> Dataset:
    """The test split of the digits, or of the pairs where the model takes them."""
    return moeprune.open_data("digits:test" if model.input_format.width == 8 else "pairs:test", model.input_format)


def accuracy(model: Model, data: Dataset) -> float:
    """The share of a data set that a model predicts right."""
    [found] = predict([model], data, RUNTIME)
    return float(found.correct.double().mean())


Method = tuple[str, str, str] | tuple[str, str, str, float | int]
"""Scope, signal, compensation (each perhaps `auto`); with a float the energy it holds, with an int its rank."""


def table(model: Model, methods: Iterable[Method], keeps: Sequence[str] = KEEPS) -> None:
    """Print for each method what it keeps on draws of calibration data with SEEDS."""
    test = test_set(model)
    print(f"full model {accuracy(model, test):.4f}; mean (least to most) of {len(SEEDS)} draws of calibration data")
    print_retained([(model, calibration(model, seed)) for seed in SEEDS], test, methods, keeps)


def print_retained(
    cases: Sequence[tuple[Model, Dataset]], test: Dataset, methods: Iterable[Method], keeps: Sequence[str]
) -> None:
    """Print for each method what it keeps, with no experts at all first: mean and range over the cases.

    Args:
        cases: models with the same layers, and the calibration data of each.
        test: what they are judged on, as a share of their full accuracy.
    """
    full = [accuracy(model, test) for model, _ in cases]
    width = 21 if len(cases) > 1 else 11
    layers = cases[0][0].config.moe_layers
    fewest = min(layer.num_experts for layer in layers.values())
    print(f"{'kept':36}", *(f"{keep:>{width}}" for keep in ("none at all", *keeps)))
    for scope, signal, compensate, *amount in methods:
        cells, options = [], {"scope": scope, "signal": signal, "compensate": compensate}
        limits = {"rank" if isinstance(each, int) else "energy": each for each in amount}
        for keep in (None, *map(parse_keep, keeps)):
            if keep is None:
                is_possible = scope == "static" and compensate not in KEEPING
            else:
                is_possible = compensate != "linear" and not (isinstance(keep, Fraction) and keep * fewest < 1)
            if not is_possible:
                cells.append(" " * width)
                continue
            how = {"keep": keep, **options, **limits}
            if keep is None:
                how = {"plan": uniform_plan(layers, 0, Way(**options, **limits))}
            results = []
            for seed, ((model, data), whole) in enumerate(zip(cases, full, strict=True)):
                pruned = moeprune.prune(model, data=data, seed=seed, runtime=RUNTIME, **how)
                results.append(accuracy(pruned, test) / whole)
            spread = f" ({min(results):.3f}-{max(results):.3f})" if len(cases) > 1 else ""
            cells.append(f"{statistics.fmean(results):{width - len(spread)}.3f}{spread}")
        name = f"{scope}, {signal}, {compensate}" + "".join(f" {each:g}" for each in amount)
        print(f"{name:36}", *cells, flush=True)
