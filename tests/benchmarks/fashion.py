"""What each way to prune keeps on real images: Fashion-MNIST, 60,000 to train on and 10,000 to test.

    python tests/benchmarks/fashion.py [FOLDER] [--cache DIR] [--only single-128 vit] [--seeds 1]

FOLDER holds the four files in the format of MNIST; the default is where Debian's package `dataset-fashion-mnist`
puts them. The models:

    single-8 … single-128    the set-up of Chung et al. 2024: one Soft MoE layer without residual on the 4 patches of
                             14×14 themselves (after a layer norm), 8 to 128 experts that share 784 hidden units (784
                             // n each, ReLU, no biases), a linear classifier of the mean token, router scale from 1
    vit, vit-no-residual     three blocks on 16 patches, the last two with 64 experts of 64 hidden units, with and
                             without a residual around these

One row of the table shows the share of the full accuracy on all test images, as the mean (least to most) over
seeds; each seed trains a model, and draws calibration images from those of training. Training takes a few minutes
for each model on one core; with --cache, trained models are kept in a folder and read from it the next time.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from common import accuracy, print_retained
from torch import Tensor, nn

import moeprune
from moeprune.data.datasets import Dataset
from moeprune.data.preprocessing import Preprocessing
from moeprune.demo.train import Recipe, fit, initialize
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.description import Details
from moeprune.models.vit import SoftMoEViT

METHODS = [
    ("static", "random", "none"),
    ("input", "combine", "none"),  # the paper's rule
    ("input", "deviation", "affine"),
    ("static", "gram", "affine"),
    ("static", "gram", "refit"),
    ("static", "gram", "renorm-refit"),
    ("static", "gram", "low-rank", 4),
    ("static", "gram", "low-rank", 8),
    ("static", "gram", "low-rank-lstsq", 4),
    ("static", "gram", "low-rank-lstsq", 8),
    ("static", "combine", "linear"),
    ("static", "auto", "auto"),
]
KEEPS = ("1/32", "1/16", "1/8", "1/4", "1/2")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREPROCESSING = Preprocessing(mean=(0.286,), std=(0.353,))  # of the training images


def single_recipe(num_experts: int) -> Recipe:
    """The paper's single layer: 4 tokens, d = 196."""
    experts = {"hidden_dim": 784 // num_experts, "activation": "relu", "bias": False}
    soft_moe = SoftMoEConfig(196, num_experts, slots_per_expert=1, **experts)
    block = BlockConfig(attention=False, soft_moe=soft_moe, residual=False)
    config = ViTConfig((28, 28), (14, 14), 1, 10, dim=196, num_heads=1, blocks=(block,), final_norm=False)
    return Recipe(config, 3000, 1e-2, 0.05, scale=1.0, position=0.0, noise=0.0, label_smoothing=0.0)


def vit_recipe(residual: bool) -> Recipe:
    """Three blocks, 16 tokens, d = 64; residual: around the two Soft MoE layers."""
    soft_moe = SoftMoEConfig(64, num_experts=64, slots_per_expert=1, hidden_dim=64)
    moe = BlockConfig(soft_moe=soft_moe, residual=residual)
    config = ViTConfig((28, 28), (7, 7), 1, 10, dim=64, num_heads=4, blocks=(BlockConfig(mlp_dim=128), moe, moe))
    return Recipe(config, 2500, 3e-3, 0.05, scale=8.0, position=0.02, noise=0.0, label_smoothing=0.0)


RECIPES = {f"single-{n}": single_recipe(n) for n in (8, 16, 32, 64, 128)}
RECIPES |= {"vit": vit_recipe(True), "vit-no-residual": vit_recipe(False)}


def trained(name: str, seed: int, folder: str, cache: Path | None) -> SoftMoEViT:
    """A model from the cache, if the recipe has not changed since; or a new one, which is put there."""
    recipe, path = RECIPES[name], None if cache is None else cache / f"{name}-{seed}.safetensors"
    settings = {field: value for field, value in asdict(recipe).items() if field != "config"}
    training = {"data": "fashion-mnist:train", "seed": seed, "recipe": settings}
    if path is not None and path.exists():
        model = moeprune.load(path)
        assert isinstance(model, SoftMoEViT)
        if (model.config, model.details.provenance["training"]) == (recipe.config, training):
            return model
    generator = torch.Generator().manual_seed(seed)
    details = Details(PREPROCESSING, {"library": "moeprune"}, {"training": training})
    model = SoftMoEViT(recipe.config, details=details)
    initialize(model, recipe.scale, recipe.position, generator)
    if name.startswith("single"):  # tokens are the patches
        nn.init.eye_(model.patch_embed.weight)
        for parameter in (*model.patch_embed.parameters(), model.position):
            parameter.requires_grad_(False)
    inputs, labels = whole(moeprune.open_data(f"{folder}:train", model.input_format))
    fit(model, recipe, batches(inputs, labels, recipe.batch_size, generator), generator)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        moeprune.save(model, path, overwrite=True)
    return model


def whole(data: Dataset) -> tuple[Tensor, Tensor]:
    """All inputs and labels of a data set."""
    inputs, labels = zip(*data.batches(1000), strict=True)
    return torch.cat(inputs), torch.cat(labels)


def batches(inputs: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches, in a new order in each epoch."""
    while True:
        for part in torch.randperm(len(inputs), generator=generator).split(size):
            if len(part) == size:
                yield inputs[part], labels[part]


def drawn(data: Dataset, count: int, seed: int) -> Dataset:
    """So many samples of a data set, drawn with a seed."""
    order = torch.randperm(data.samples, generator=torch.Generator().manual_seed(1000 + seed))
    return data.part(sorted(order[:count].tolist()), f"draw {seed}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=DEBIAN, type=Path)
    parser.add_argument("--cache", type=Path, help="folder of trained models")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=2000, help="calibration images")
    options = parser.parse_args()
    for name in options.only:
        models = [trained(name, seed, str(options.folder), options.cache) for seed in range(options.seeds)]
        train, test = (
            moeprune.open_data(f"{options.folder}:{split}", models[0].input_format) for split in ("train", "test")
        )
        full = ", ".join(f"{accuracy(model, test):.4f}" for model in models)
        print(f"{name}: full model {full}; {options.calibration} calibration images")
        cases = [(model, drawn(train, options.calibration, seed)) for seed, model in enumerate(models)]
        print_retained(cases, test, METHODS, KEEPS)
        print()


if __name__ == "__main__":
    main()
