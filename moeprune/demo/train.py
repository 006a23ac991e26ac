"""Train models from scratch, seeded: the demo's on scikit-learn's digits, only on the `train` split."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from moeprune import __version__
from moeprune.data.datasets import digits
from moeprune.data.preprocessing import InputFormat, Preprocessing
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.description import Details
from moeprune.models.vit import SoftMoEViT

PREPROCESSING = Preprocessing(mean=(0.3,), std=(0.375,))  # about the statistics of the digits


@dataclass(frozen=True)
class Recipe:
    """Architecture and training of one model.

    The sharper the router, the more the combine mass says about an expert; the more tokens differ in their
    positions, the fewer experts a sharp router leaves unused.
    """

    config: ViTConfig
    steps: int
    learning_rate: float
    weight_decay: float
    scale: float  # of the router at first
    position: float  # standard deviation of the initial position embeddings
    noise: float  # standard deviation, on normalised pixels
    label_smoothing: float
    batch_size: int = 128


def single_layer_recipe(num_experts: int = 128) -> Recipe:
    """Return one Soft MoE layer without residual on the digits: 16 tokens, d = 32, 512 hidden units."""
    soft_moe = SoftMoEConfig(32, num_experts, slots_per_expert=1, hidden_dim=512 // num_experts)
    block = BlockConfig(attention=False, soft_moe=soft_moe, residual=False)
    config = ViTConfig((8, 8), (2, 2), 1, 10, dim=32, num_heads=4, blocks=(block,), final_norm=False)
    return Recipe(config, 1500, 3e-3, 0.1, scale=5.0, position=1.0, noise=0.3, label_smoothing=0.05)


def pairs_recipe() -> Recipe:
    """Return four blocks with residuals on pairs of digits: 32 tokens, d = 64, three layers of 64 experts."""
    mlp = BlockConfig(mlp_dim=128)
    moe = BlockConfig(soft_moe=SoftMoEConfig(64, num_experts=64, slots_per_expert=2, hidden_dim=16))
    config = ViTConfig((8, 16), (2, 2), 1, 100, dim=64, num_heads=4, blocks=(mlp, moe, moe, moe))
    return Recipe(config, 3000, 2e-3, 0.01, scale=16.0, position=0.1, noise=0.2, label_smoothing=0.0)


def initialize(model: SoftMoEViT, scale: float, position: float, generator: torch.Generator) -> None:
    """Draw the initial weights from one generator; scale, position: those of a Recipe."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SoftMoE):
                module.reset_parameters(generator, scale)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=1 / math.sqrt(module.in_features), generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        model.position.normal_(std=position, generator=generator)
        if model.config.class_token:
            model.class_token.normal_(std=0.1, generator=generator)


def train(recipe: Recipe, seed: int = 0, progress: bool = True) -> SoftMoEViT:
    """Return a model trained by a recipe, in eval mode; equal seeds give equal weights."""
    generator = torch.Generator().manual_seed(seed)
    settings = {name: value for name, value in asdict(recipe).items() if name != "config"}
    trained = {"data": "digits:train", "seed": seed, "recipe": settings, "moeprune": __version__}
    details = Details(PREPROCESSING, {"library": "moeprune"}, {"training": trained})
    model = SoftMoEViT(recipe.config, details=details)
    initialize(model, recipe.scale, recipe.position, generator)
    return fit(model, recipe, _batches(recipe, generator), generator, progress)


def fit(
    model: SoftMoEViT,
    recipe: Recipe,
    batches: Iterator[tuple[Tensor, Tensor]],
    generator: torch.Generator,
    progress: bool = True,
) -> SoftMoEViT:
    """Train a model in place by a recipe, on batches of inputs (b,c,H,W) and labels (b,); return it in eval mode.

    generator: of the noise that the recipe adds to inputs.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    warm_up = max(1, recipe.steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for _ in tqdm(range(recipe.steps), desc="train", unit=" steps", disable=None if progress else True):
        images, labels = next(batches)
        images = images + recipe.noise * torch.randn(images.shape, generator=generator)
        loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def _batches(recipe: Recipe, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches of digits, or of pairs if the model takes wider images."""
    pixels, labels = digits("train")
    images = InputFormat(1, 8, 8, 10, PREPROCESSING).normalize(pixels)
    sides = recipe.config.image_size[1] // 8
    while True:
        index = torch.randint(len(images), (sides, recipe.batch_size), generator=generator)
        classes = labels[index]
        label = classes[0] if sides == 1 else 10 * classes[0] + classes[1]
        yield torch.cat(list(images[index]), dim=3), label
