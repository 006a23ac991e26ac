"""The model around the Soft MoE layers: built from plain data, found in, pruned, or left dense."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune.architecture import BlockConfig, ViTConfig
from moeprune.plan import LayerPlan, Plan
from moeprune.soft_moe import SoftMoE


class SoftMoEViT(nn.Module):
    """A vision transformer with Soft MoE layers: images (b,c,H,W) in, logits (b,classes) out.

    Args:
        config: the architecture of the unpruned model.
        plan: the plan of each pruned layer; layers that it does not name are dense.
    """

    def __init__(self, config: ViTConfig, plan: Plan | None = None):
        super().__init__()
        plan = plan or {}
        self.config = config
        patch_height, patch_width = config.patch_size
        self.patch_embed = nn.Linear(config.in_channels * patch_height * patch_width, config.dim)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, config.dim))
        self.position = nn.Parameter(torch.empty(config.num_tokens, config.dim))
        self.blocks = nn.ModuleList(
            Block(config, block, plan.get(f"blocks.{index}.soft_moe"))
            for index, block in enumerate(config.blocks)
        )
        self.norm = nn.LayerNorm(config.dim) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(self.patches(images))
        if self.config.class_token:
            tokens = torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], dim=1)
        tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        if self.config.pooling == "token":
            return self.head(tokens[:, 0])
        return self.head(tokens[:, int(self.config.class_token) :].mean(dim=1))

    def patches(self, images: Tensor) -> Tensor:
        """Images (b,c,H,W) as rows of pixels (b,patches,c·ph·pw), patches in reading order."""
        (ph, pw), b = self.config.patch_size, len(images)
        grid = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (b,c,gh,ph,gw,pw)
        return grid.permute(0, 2, 4, 1, 3, 5).reshape(b, self.config.num_patches, -1)


class Block(nn.Module):
    """Pre-norm attention (if any), then a pre-norm MLP or Soft MoE."""

    def __init__(self, config: ViTConfig, block: BlockConfig, plan: LayerPlan | None):
        super().__init__()
        self.residual = block.residual
        if block.attention:
            self.norm1 = nn.LayerNorm(config.dim)
            self.attention = Attention(config.dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.dim)
        if block.soft_moe is not None:
            self.soft_moe = SoftMoE(block.soft_moe, plan)
        else:
            assert block.mlp_dim is not None
            self.mlp = nn.Sequential(
                nn.Linear(config.dim, block.mlp_dim), nn.GELU(), nn.Linear(block.mlp_dim, config.dim)
            )

    def forward(self, x: Tensor) -> Tensor:  # (b,m,d) -> (b,m,d)
        if hasattr(self, "attention"):
            x = x + self.attention(self.norm1(x))
        mixer = self.soft_moe if hasattr(self, "soft_moe") else self.mlp
        y = mixer(self.norm2(x))
        return x + y if self.residual else y


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (b,m,d) -> (b,m,d)
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (b,m,3,heads,d/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
