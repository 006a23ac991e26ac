"""A vision transformer with Soft MoE layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune.layers.activations import ACTIVATIONS
from moeprune.layers.interface import Activation
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.description import Details
from moeprune.models.model import Model
from moeprune.plan import LayerPlan, Plan


class SoftMoEViT(Model):
    """A vision transformer with Soft MoE layers, the blocks of a plan pruned and all others dense.

    Images (b,c,H,W) in, logits (b,classes) out, or of every token (b,m,classes) with pooling `none`; without
    a head, features in place of logits.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig, plan: Plan | None = None, details: Details = Details()):
        super().__init__(config, details)
        self.patch_embed = nn.Linear(config.patch_values, config.dim, bias=not config.embedding_norm)
        if config.class_token:
            self.class_token = nn.Parameter(0.02 * torch.randn(1, config.dim))
        self.position = nn.Parameter(0.02 * torch.randn(config.num_positions, config.dim))
        self.embedding_norm = _norm(config, config.embedding_norm)
        plan = plan or {}
        self.blocks = nn.ModuleList(
            Block(config, block, plan.get(f"blocks.{index}.soft_moe")) for index, block in enumerate(config.blocks)
        )
        self.norm = _norm(config, config.final_norm)
        self.head_norm = _norm(config, config.head_norm)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()

    @property
    def sequence(self) -> list[str]:
        """The blocks; none of a subclass, in which they may have another order, or be used twice."""
        is_own = type(self).forward is not SoftMoEViT.forward or any(type(block) is not Block for block in self.blocks)
        return [] if is_own else [f"blocks.{index}" for index in range(len(self.blocks))]

    def forward(self, images: Tensor) -> Tensor:
        """Images (b,c,H,W) in, logits (b,classes) out, or (b,m,classes)."""
        tokens = self.embedding_norm(self.embed(images))
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        if self.config.pooling == "token":
            tokens = tokens[:, 0]
        elif self.config.pooling == "mean":
            tokens = tokens[:, int(self.config.class_token) :].mean(dim=1)
        return self.head(self.head_norm(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Return images (b,c,H,W) as tokens with their positions (b,m,d), the class token first."""
        (ph, pw), b = self.config.patch_size, images.shape[0]
        grid = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (b,c,gh,ph,gw,pw)
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(b, self.config.num_patches, -1)  # in reading order
        tokens = self.patch_embed(patches)
        if not self.config.class_position:  # there is a class token
            return torch.cat([self.class_token.expand(b, 1, -1), tokens + self.position], dim=1)
        if self.config.class_token:
            tokens = torch.cat([self.class_token.expand(b, 1, -1), tokens], dim=1)
        return tokens + self.position


class Block(nn.Module):
    """Pre-norm attention (if any), then a pre-norm MLP or Soft MoE."""

    def __init__(self, config: ViTConfig, block: BlockConfig, plan: LayerPlan | None):
        super().__init__()
        d, self.residual = config.dim, block.residual
        if block.attention:
            self.norm1 = _norm(config)
            self.attention = Attention(config)
        self.norm2 = _norm(config)
        self.attention_scale = nn.Parameter(torch.ones(d)) if config.layer_scale and block.attention else None
        self.mixer_scale = nn.Parameter(torch.ones(d)) if config.layer_scale else None
        if block.soft_moe is not None:
            self.soft_moe = SoftMoE(block.soft_moe, plan)
        elif block.mlp_dim is not None:
            activation = Elementwise(config.activation)
            self.mlp = nn.Sequential(nn.Linear(d, block.mlp_dim), activation, nn.Linear(block.mlp_dim, d))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b,m,d) in, tokens (b,m,d) out."""
        if hasattr(self, "attention"):
            x = x + _scaled(self.attention(self.norm1(x)), self.attention_scale)
        mixer = self.soft_moe if hasattr(self, "soft_moe") else self.mlp
        y = _scaled(mixer(self.norm2(x)), self.mixer_scale)
        return x + y if self.residual else y


class Elementwise(nn.Module):
    """An activation by name."""

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Values of any shape in, the same shape out."""
        return ACTIVATIONS[self.activation](x)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.q_norm = _norm(config, config.qk_norm, config.dim // config.num_heads)
        self.k_norm = _norm(config, config.qk_norm, config.dim // config.num_heads)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b,m,d) in, tokens (b,m,d) out."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (b,m,3,heads,d/heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _norm(config: ViTConfig, present: bool = True, width: int | None = None) -> nn.Module:
    return nn.LayerNorm(width or config.dim, config.norm_eps) if present else nn.Identity()


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale
