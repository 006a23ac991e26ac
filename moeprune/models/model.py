"""The model around the Soft MoE layers: built, loaded, saved, and searched for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeprune.data.datasets import Dataset, open_data
from moeprune.data.preprocessing import InputFormat
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.layers.soft_moe import SoftMoE
from moeprune.models import adopted
from moeprune.models.adopted import AdoptedModel
from moeprune.models.architecture import BlockConfig, ModuleConfig, ViTConfig
from moeprune.models.description import FORMAT, Details, read_description
from moeprune.models.tensors import require_one_type
from moeprune.plan import LayerPlan, Plan, plan_to_json


class SoftMoEViT(nn.Module):
    """A vision transformer with Soft MoE layers: images (b,c,H,W) in, logits (b,classes) out, or of
    every token (b,m,classes) with pooling `none`; without a head, features in place of logits.

    Args:
        config: the architecture of the unpruned model.
        plan: the plan of each pruned layer; layers that it does not name are dense.
        details: what its checkpoint says beside that.
    """

    def __init__(self, config: ViTConfig, plan: Plan | None = None, details: Details = Details()):
        super().__init__()
        plan = plan or {}
        self.config = config
        self.details = details
        patch_height, patch_width = config.patch_size
        pixels = config.in_channels * patch_height * patch_width
        self.patch_embed = nn.Linear(pixels, config.dim, bias=not config.embedding_norm)
        if config.class_token:
            self.class_token = nn.Parameter(0.02 * torch.randn(1, config.dim))
        self.position = nn.Parameter(0.02 * torch.randn(config.num_positions, config.dim))
        self.embedding_norm = _norm(config, config.embedding_norm)
        self.blocks = nn.ModuleList(
            Block(config, block, plan.get(f"blocks.{index}.soft_moe"))
            for index, block in enumerate(config.blocks)
        )
        self.norm = _norm(config, config.final_norm)
        self.head_norm = _norm(config, config.head_norm)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()

    @property
    def input_format(self) -> InputFormat:
        """What the model takes, and how pixels become that."""
        config = self.config
        return InputFormat(
            config.in_channels, *config.image_size, config.num_classes, self.details.preprocessing
        )

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
        """Images (b,c,H,W) as tokens with their positions (b,m,d), the class token first."""
        tokens = self.patch_embed(self.patches(images))
        if not self.config.class_token:
            return tokens + self.position
        class_token = self.class_token.expand(len(tokens), 1, -1)
        if self.config.class_position:
            return torch.cat([class_token, tokens], dim=1) + self.position
        return torch.cat([class_token, tokens + self.position], dim=1)

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
            self.norm1 = _norm(config)
            self.attention = Attention(config)
        self.norm2 = _norm(config)
        self.register_parameter("attention_scale", None)
        self.register_parameter("mixer_scale", None)
        if config.layer_scale:
            if block.attention:
                self.attention_scale = nn.Parameter(torch.ones(config.dim))
            self.mixer_scale = nn.Parameter(torch.ones(config.dim))
        if block.soft_moe is not None:
            self.soft_moe = SoftMoE(block.soft_moe, plan)
        else:
            assert block.mlp_dim is not None
            self.mlp = nn.Sequential(
                nn.Linear(config.dim, block.mlp_dim), nn.GELU(), nn.Linear(block.mlp_dim, config.dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b,m,d) in, tokens (b,m,d) out."""
        if hasattr(self, "attention"):
            x = x + _scaled(self.attention(self.norm1(x)), self.attention_scale)
        mixer = self.soft_moe if hasattr(self, "soft_moe") else self.mlp
        y = _scaled(mixer(self.norm2(x)), self.mixer_scale)
        return x + y if self.residual else y


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


Model = SoftMoEViT | AdoptedModel
M = TypeVar("M", bound=nn.Module)


def moe_layers(model: nn.Module) -> dict[str, SoftMoE]:
    """The Soft MoE layers of a model by name, in the order of the data flow."""
    if isinstance(model, AdoptedModel):
        return {name: adopted.layer_of(model, name) for name in model.config.layers}
    return {name: module for name, module in model.named_modules() if isinstance(module, SoftMoE)}


def require_moe_layers(model: nn.Module) -> dict[str, SoftMoE]:
    """The same, or a MoepruneError where there is none."""
    layers = moe_layers(model)
    if not layers:
        raise MoepruneError("no Soft MoE layer in the model", "there is nothing to prune in it")
    return layers


def require_dense_layers(model: nn.Module, hint: str) -> dict[str, SoftMoE]:
    """The Soft MoE layers, or a MoepruneError where there is none or one is pruned already."""
    layers = require_moe_layers(model)
    if pruned := [f"`{name}`" for name, layer in layers.items() if layer.plan is not None]:
        raise MoepruneError(f"layers {', '.join(pruned)} are already pruned", hint)
    return layers


def private_copy(model: M) -> M:
    """A copy in eval mode that can be observed, moved and altered without a trace in the model.

    Its parameters are its own but lie in the same memory: nothing is copied until one of the two is
    moved or converted. To train either of them in place, `copy.deepcopy` it first.
    """
    memory: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    memory |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memory).eval()


def plan_of(model: nn.Module) -> Plan:
    """The plans of the pruned layers of a model."""
    return {name: layer.plan for name, layer in moe_layers(model).items() if layer.plan is not None}


def dataset_for(model: Model, data: Dataset | str, split: str, limit: int | None = None) -> Dataset:
    """The data set itself, or the one that a spec names, opened for the model.

    Args:
        split: the split of a built-in set whose spec names none.
        limit: samples to take at most.
    """
    return open_data(data, model.input_format, split, limit) if isinstance(data, str) else data


def fingerprint(model: Model) -> str:
    """SHA-256 of the architecture and all tensors."""
    return checkpoint.fingerprint(model.state_dict(), model.config.to_json())


def unpruned_fingerprint(model: Model) -> str:
    """The fingerprint of the model that this one was pruned from, as far as it says so, or else its own."""
    pruned_from = model.details.provenance.get("pruned_from")
    if isinstance(pruned_from, dict) and isinstance(pruned_from.get("fingerprint"), str):
        return pruned_from["fingerprint"]
    return fingerprint(model)


def save(model: Model, path: str | Path) -> None:
    """Write a checkpoint: equal models give equal bytes.

    Raises:
        MoepruneError: the path cannot be written, or weights are NaN, infinite or of several types.
    """
    tensors = model.state_dict()
    checkpoint.check_finite(tensors, path)
    infos = checkpoint.tensor_infos(tensors)
    if isinstance(model, AdoptedModel):  # the user's own part may be of several
        infos = {name: info for name, info in infos.items() if name.rpartition(".")[0] in model.config.layers}
    require_one_type(infos, path)
    metadata = {
        "format": FORMAT,
        "kind": "checkpoint",
        "architecture": model.config.to_json(),
        "preprocessing": model.details.preprocessing.to_json(),
        "source": model.details.source,
        "plan": plan_to_json(plan_of(model)),
        "provenance": model.details.provenance,
    }
    if not metadata["plan"]:  # what analyses refer to
        metadata["fingerprint"] = fingerprint(model)
    checkpoint.write(path, tensors, metadata)


def load(path: str | Path, factory: str | None = None) -> Model:
    """Load a checkpoint that moeprune wrote, pruned or not: a model in eval mode on the CPU.

    The weights are memory-mapped from the file.

    Args:
        path: of the checkpoint.
        factory: `package.module:function` that builds the model, where it is of the user's own code.
            The checkpoint names it too, but only a caller can tell that it may be run.

    Raises:
        MoepruneError: the file is missing, damaged, of an unknown format, has no Soft MoE layer,
            lacks tensors or has others, or has NaN or infinite values; or the factory is missing or
            another one than the checkpoint names.
    """
    version = checkpoint.version_of(path)
    file = checkpoint.read(path)
    config, plan, details = read_description(file.header)
    model: Model
    if isinstance(config, ModuleConfig):
        require_factory(config, factory, path)
        checkpoint.check_finite_in_file(file.header)
        model = adopted.skeleton(config, plan, details)
        adopted.load_strictly(model, file.tensors, path)
    else:
        if factory is not None:
            raise MoepruneError(
                f"`{path}` is no model of your own code: it needs no `--model`", "leave `--model` out"
            )
        checkpoint.check_finite_in_file(file.header)
        with torch.device("meta"):
            model = SoftMoEViT(config, plan, details)
        model.load_state_dict(file.tensors, assign=True)
    if checkpoint.version_of(path) != version:
        raise MoepruneError(f"`{path}` was replaced while it was read", "try again")
    return model.requires_grad_(False).eval()


def require_factory(config: ModuleConfig, factory: str | None, path: str | Path) -> None:
    """Raise a MoepruneError unless the factory is the one that a checkpoint names."""
    if config.factory is None:
        raise MoepruneError(
            f"`{path}` does not say which factory builds its model",
            "adopt it again and say: `moeprune.adopt(model, input_shape, factory)`",
        )
    if factory != config.factory:
        given = "none is given" if factory is None else f"given is `{factory}`"
        raise MoepruneError(
            f"the model of `{path}` is built by the factory `{config.factory}`, {given}",
            f"if you trust that code, add `--model {config.factory}`",
        )
