"""FLOPs of a model, counted from its architecture and plan; no torch.

1 multiply-add = 2 FLOPs. Matrix products are counted, as `torch.utils.flop_counter.FlopCounterMode`
does; softmax, norms, activations, additions and sorting are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from moeprune.layers.flops import Flops
from moeprune.models.architecture import BlockConfig, ModuleConfig, ViTConfig
from moeprune.plan import Plan


def tokens_of(config: ViTConfig | ModuleConfig, name: str) -> int:
    """The tokens of one input, m, that a Soft MoE layer of a model gets."""
    return config.num_tokens if isinstance(config, ViTConfig) else config.layers[name].tokens


def model_flops(
    config: ViTConfig | ModuleConfig, plan: Plan, running: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs of a whole model on one input.

    Args:
        config: of the unpruned model.
        plan: of its pruned layers.
        running: experts that run in a layer, in the mean, where its plan does not fix it.
    """
    running = running or {}
    if isinstance(config, ViTConfig):
        return vit_flops(config, plan, running)
    flops = Flops(other=config.other_flops)
    for name, layer in config.layers.items():
        flops += layer.soft_moe.flops(layer.tokens, plan.get(name), running.get(name))
    return flops


def vit_flops(
    config: ViTConfig, plan: Plan | None = None, running: Mapping[str, float] | None = None
) -> Flops:
    """FLOPs of a whole model on one image; see `model_flops`."""
    plan, running = plan or {}, running or {}
    m, d = config.num_tokens, config.dim
    patch_height, patch_width = config.patch_size
    pixels = config.in_channels * patch_height * patch_width
    heads = m if config.pooling == "none" else 1
    flops = Flops(other=2 * config.num_patches * pixels * d + 2 * heads * d * config.num_classes)
    for index, block in enumerate(config.blocks):
        flops += Flops(other=_block_other(block, m, d))
        if block.soft_moe is not None:
            name = f"blocks.{index}.soft_moe"
            flops += block.soft_moe.flops(m, plan.get(name), running.get(name))
    return flops


def _block_other(block: BlockConfig, m: int, d: int) -> int:
    attention = 8 * m * d * d + 4 * m * m * d if block.attention else 0
    mlp = 4 * m * d * block.mlp_dim if block.mlp_dim else 0
    return attention + mlp
