"""The architecture of a model as plain data, enough to build it and to compute its cost; no torch.

Axes, here and everywhere: b inputs, m tokens, d model width, n experts, p slots per expert, h hidden width of
an expert.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from moeprune.errors import MoepruneError
from moeprune.files.header import TensorInfo
from moeprune.layers.config import SoftMoEConfig, layer_from_json
from moeprune.layers.interface import Activation, Flops, LayerConfig, Shapes, Usage
from moeprune.models.results import BytesByPart, FlopsByPart, ModelCost
from moeprune.plan import Count, Plan, Positive
from moeprune.records import Record, from_json, to_json, unpack

Total = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class ModelConfig(Record, frozen=True, tag_field="type"):
    """A model that holds MoE layers; everything outside moeprune.models asks no further what it is."""

    if TYPE_CHECKING:  # fields or properties of each kind

        @property
        def input_shape(self) -> tuple[int, int, int]:
            """Shape of one input (c,H,W)."""

        @property
        def num_classes(self) -> int:
            """Width of the output; 0 if the model has no head and returns features."""

        @property
        def moe_layers(self) -> Mapping[str, LayerConfig]:
            """The MoE layers by name, in the order of the data flow."""

        @property
        def other_flops(self) -> int:
            """FLOPs of one input outside of the MoE layers."""

        def tokens(self, name: str) -> int:
            """Return m, the tokens of one input that reach an MoE layer."""

    @property
    def outputs_per_input(self) -> int:
        """Rows of logits that the model returns for one input."""
        return 1

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries whose layers were replaced in a model of the user's own; empty if all is ours."""
        return ()

    def flops(self, plan: Plan, usage: Mapping[str, Usage] | None = None) -> Flops:
        """Return the FLOPs of one input: 1 multiply-add = 2 FLOPs.

        Matrix products are counted, as `torch.utils.flop_counter.FlopCounterMode` does; softmax, norms,
        activations, additions and sorting are left out. usage: measured, of layers whose plans do not fix it.
        """
        usage, flops = usage or {}, Flops(other=self.other_flops)
        for name, layer in self.moe_layers.items():
            flops += layer.flops(self.tokens(name), plan.get(name), usage.get(name))
        return flops

    def cost(
        self, plan: Plan, tensors: Mapping[str, TensorInfo], usage: Mapping[str, Usage] | None = None
    ) -> ModelCost:
        """Return parameters, bytes, FLOPs per input and experts per input of a model with these tensors.

        For a plan with a mass and without measured usage, the largest possible number of experts is counted.
        """
        usage, layers = usage or {}, self.moe_layers
        parts = {"experts": 0, "routing": 0, "compensation": 0, "other": 0}
        for name, tensor in tensors.items():
            layer, _, key = name.rpartition(".")
            parts[layers[layer].part(key) if layer in layers else "other"] += tensor.nbytes
        experts: dict[str, float] = {name: layer.num_experts for name, layer in layers.items()}
        experts |= {name: layer.k for name, layer in plan.items()}
        experts |= {name: of_layer.running for name, of_layer in usage.items()}
        flops = self.flops(plan, usage)
        return ModelCost(
            parameters=sum(tensor.numel for tensor in tensors.values()),
            bytes=sum(parts.values()),
            bytes_by_part=BytesByPart(**parts),
            flops_per_input=FlopsByPart(total=flops.total, **asdict(flops)),
            experts_per_input=float(sum(experts.values())),
        )

    def shapes(self, plan: Plan) -> Shapes:
        """Return the shapes of the tensors that are known beforehand, by their names in the `state_dict`."""
        return {
            f"{name}.{tensor}": shape
            for name, layer in self.moe_layers.items()
            for tensor, shape in layer.shapes(plan.get(name)).items()
        }

    def known(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors that `shapes` must list: of a model of the user's own, those of the MoE layers."""
        layers = self.moe_layers
        return {name: t for name, t in tensors.items() if not self.libraries or name.rpartition(".")[0] in layers}

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values; `architecture_from_json` reads it back."""
        return to_json(self)


class BlockConfig(Record, frozen=True):
    """One pre-norm block: attention (or none), then an MLP of width mlp_dim or a Soft MoE.

    residual: the MLP or Soft MoE is added to its input and does not replace it; attention always is added.
    """

    attention: bool = True
    mlp_dim: Positive | None = None
    soft_moe: SoftMoEConfig | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mlp_dim is None) == (self.soft_moe is None):
            raise MoepruneError("a block has either `mlp_dim` or `soft_moe`, never both or none")


class ViTConfig(ModelConfig, frozen=True, tag="vit"):
    """A vision transformer in which some blocks have a Soft MoE; images (b,c,H,W) in, logits out.

    num_classes: 0 for a model without a head, which returns pooled features.
    pooling: over the patch tokens (`mean`), or takes the class token (`token`); with `none` every token, the
        class token too, gives logits.
    class_position: the class token has a row of its own in the position embedding.
    embedding_norm: a norm follows the position embedding, and patches are embedded without a bias.
    final_norm, head_norm: a norm before and one after the pooling.
    qk_norm: queries and keys are normalised, each head by itself.
    qkv_bias: queries, keys and values have a bias.
    layer_scale: learned factors scale the output of attention and of the MLP or Soft MoE in each channel.
    norm_eps: of every norm.
    activation: of the MLPs of blocks without a Soft MoE.
    """

    image_size: tuple[Positive, Positive]
    patch_size: tuple[Positive, Positive]
    in_channels: Positive
    num_classes: Count
    dim: Positive
    num_heads: Positive
    blocks: tuple[BlockConfig, ...]
    class_token: bool = False
    pooling: Literal["mean", "token", "none"] = "mean"
    final_norm: bool = True
    class_position: bool = True
    embedding_norm: bool = False
    head_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool = True
    layer_scale: bool = False
    norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size % patch for size, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise MoepruneError(
                f"`image_size` {list(self.image_size)} is not a multiple of `patch_size` {list(self.patch_size)}"
            )
        if self.dim % self.num_heads:
            raise MoepruneError(f"`dim` {self.dim} is not a multiple of `num_heads` {self.num_heads}")
        if self.pooling == "token" and not self.class_token:
            raise MoepruneError("`pooling` token needs `class_token` true")
        if not self.class_position and not self.class_token:
            raise MoepruneError("`class_position` false needs `class_token` true")
        for layer in self.moe_layers.values():
            for width in (layer.dim, layer.output_width):
                if width != self.dim:
                    raise MoepruneError(f"a Soft MoE of width {width} is in a model of `dim` {self.dim}")

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        (height, width), (patch_height, patch_width) = self.image_size, self.patch_size
        return (height // patch_height) * (width // patch_width)

    @property
    def num_tokens(self) -> int:
        """m: the patches, and the class token if there is one."""
        return self.num_patches + self.class_token

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding."""
        return self.num_patches + (self.class_token and self.class_position)

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.in_channels * self.patch_size[0] * self.patch_size[1]

    @property
    def moe_layers(self) -> dict[str, SoftMoEConfig]:
        """The Soft MoE layers by name, in the order of the data flow."""
        blocks = enumerate(self.blocks)
        return {f"blocks.{i}.soft_moe": block.soft_moe for i, block in blocks if block.soft_moe is not None}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image (c,H,W)."""
        return self.in_channels, *self.image_size

    @property
    def outputs_per_input(self) -> int:
        """Rows of logits for one image: one, or one for each token without pooling."""
        return self.num_tokens if self.pooling == "none" else 1

    @property
    def weights(self) -> Shapes:
        """Shapes of the weights of linears (outputs,inputs) and norms (width), all but those of the Soft MoEs."""
        d, head_dim = self.dim, self.dim // self.num_heads
        weights: Shapes = {"patch_embed": (d, self.patch_values)}
        weights |= {"embedding_norm": (d,)} if self.embedding_norm else {}
        for index, block in enumerate(self.blocks):
            of_block: Shapes = {"norm2": (d,)}
            if block.attention:
                of_block |= {"norm1": (d,), "attention.qkv": (3 * d, d), "attention.proj": (d, d)}
            if block.attention and self.qk_norm:
                of_block |= {"attention.q_norm": (head_dim,), "attention.k_norm": (head_dim,)}
            if block.mlp_dim is not None:
                of_block |= {"mlp.0": (block.mlp_dim, d), "mlp.2": (d, block.mlp_dim)}
            weights |= {f"blocks.{index}.{name}": shape for name, shape in of_block.items()}
        weights |= {"norm": (d,)} if self.final_norm else {}
        weights |= {"head_norm": (d,)} if self.head_norm else {}
        return weights | ({"head": (self.num_classes, d)} if self.num_classes else {})

    @property
    def other_flops(self) -> int:
        """FLOPs of one image for the embedding, attention, MLPs and the head."""
        m, rows = self.num_tokens, {"patch_embed": self.num_patches, "head": self.outputs_per_input}
        linears = (2 * rows.get(name, m) * math.prod(shape) for name, shape in self.weights.items() if len(shape) == 2)
        return sum(linears) + sum(4 * m * m * self.dim for block in self.blocks if block.attention)

    def tokens(self, name: str) -> int:
        """Return m, which is the same in every layer."""
        return self.num_tokens

    def shapes(self, plan: Plan) -> Shapes:
        """Return the shape of every tensor of the model."""
        d = self.dim
        shapes: Shapes = {"position": (self.num_positions, d)}
        shapes |= {"class_token": (1, d)} if self.class_token else {}
        for index, block in enumerate(self.blocks if self.layer_scale else ()):
            shapes |= {f"blocks.{index}.mixer_scale": (d,)}
            shapes |= {f"blocks.{index}.attention_scale": (d,)} if block.attention else {}
        for name, weight in sorted(self.weights.items(), key=lambda item: -len(item[1])):  # linears first
            has_bias = self.qkv_bias if name.endswith(".qkv") else not self.embedding_norm or name != "patch_embed"
            shapes |= {f"{name}.weight": weight} | ({f"{name}.bias": weight[:1]} if has_bias else {})
        return shapes | super().shapes(plan)


class AdoptedLayer(Record, frozen=True):
    """A layer that took the place of one of another library.

    tokens: m, of one input. place: among the layers, in the order of the data flow, which JSON objects do not keep.
    """

    layer: LayerConfig
    library: str
    tokens: Positive
    place: Total = 0


class ModuleConfig(ModelConfig, frozen=True, tag="module"):
    """A model of the user's own code whose MoE layers were adopted; `layers` are in the order of the data flow.

    factory: builds the model as it was before, see `moeprune.models.factory`; None if it is not known.
    arguments: keyword arguments of the factory, see `moeprune.records.pack`.
    """

    factory: str | None
    arguments: dict[str, Any]
    input_shape: tuple[Positive, Positive, Positive]
    num_classes: Total
    layers: dict[str, AdoptedLayer]
    other_flops: Total

    @property
    def unpacked_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the factory, with tuples."""
        return unpack(self.arguments)

    @property
    def moe_layers(self) -> dict[str, LayerConfig]:
        """The adopted layers by name, in the order of the data flow."""
        return {name: adopted.layer for name, adopted in self.layers.items()}

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that the layers were from."""
        return tuple(sorted({adopted.library for adopted in self.layers.values()}))

    def tokens(self, name: str) -> int:
        """Return m, the tokens of one input that reach an MoE layer."""
        return self.layers[name].tokens


def architecture_from_json(value: Any) -> ModelConfig:
    """Read the config of a model, with layers of any registered family, from JSON values."""
    layers = value.get("layers") if isinstance(value, Mapping) else None
    if isinstance(layers, Mapping):
        read = {
            name: {**layer, "layer": layer_from_json(layer.get("layer"), f"architecture: layers: {name}")}
            if isinstance(layer, Mapping)
            else layer
            for name, layer in layers.items()
        }
        value = {**value, "layers": read}
    config: ModelConfig = from_json(value, ViTConfig | ModuleConfig, "architecture")
    if isinstance(config, ModuleConfig):
        config = config.replace(layers=dict(sorted(config.layers.items(), key=lambda each: each[1].place)))
    return config
