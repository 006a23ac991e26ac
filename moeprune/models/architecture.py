"""What a model is made of, as plain data: all that is needed to build it, and its JSON form.

Axes, here and everywhere: b inputs, m tokens, d model width, n experts, p slots per expert,
h hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.families import layer_from_json
from moeprune.layers.flops import Flops, Usage
from moeprune.layers.interface import LayerConfig, Shapes
from moeprune.models.details import Details
from moeprune.plan import Plan
from moeprune.records import Record, to_json

if TYPE_CHECKING:
    from moeprune.models.model import Model
    from moeprune.models.module import Factory

POOLINGS = ("mean", "token", "none")


class ModelConfig(Protocol):
    """A model that holds MoE layers, as plain data.

    Everything outside moeprune.models takes any of these and asks no further.
    """

    @property
    def moe_layers(self) -> Mapping[str, LayerConfig]:
        """The MoE layers by name, in the order of the data flow."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input (c,H,W)."""

    @property
    def num_classes(self) -> int:
        """Width of the output; 0 if the model has no head and returns features."""

    @property
    def outputs_per_input(self) -> int:
        """Rows of logits that the model returns for one input."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries whose layers were replaced in a model of the user's own code; empty if it is ours."""

    def tokens(self, name: str) -> int:
        """Return m, the tokens of one input that reach an MoE layer."""

    def flops(self, plan: Plan, usage: Mapping[str, Usage] | None = None) -> Flops:
        """Return the FLOPs of one input.

        1 multiply-add = 2 FLOPs. Matrix products are counted, as
        `torch.utils.flop_counter.FlopCounterMode` does; softmax, norms, activations, additions and
        sorting are left out.

        Args:
            plan: of the pruned layers.
            usage: of layers, as measured, where the plan does not fix it.
        """

    def shapes(self, plan: Plan) -> Shapes:
        """Return the shape of each tensor that is known beforehand, by its name in the `state_dict`."""

    def covers(self, tensor: str) -> bool:
        """Return True if `shapes` lists a tensor of this name whenever the model has one."""

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values; `architecture_from_json` reads it back."""

    def build(self, plan: Plan, details: Details = Details(), factory: Factory | None = None) -> Model:
        """Return the model, whose weights are yet to be loaded.

        Args:
            plan: of the pruned layers.
            details: what its checkpoint says besides.
            factory: of the user's own code, which the caller allows to run.

        Raises:
            MoepruneError: the factory is missing, is not the expected one, or fails.
        """


def architecture_from_json(value: Any) -> ModelConfig:
    """Read the config of a model from JSON values.

    Raises:
        MoepruneError: an unknown type, an unknown or missing key, or a value that does not fit.
    """
    is_module = isinstance(value, Mapping) and value.get("type") == "module"
    return module_from_json(value) if is_module else vit_from_json(value)


def later(default: Any) -> Any:
    """A field that came after the first release, with the default that says what was so before."""
    return field(default=default, metadata={"later": True})


def _to_json(config: Any) -> dict[str, Any]:
    """A config as JSON values, without fields that came later and have their default.

    What is written of older models, and their fingerprints, stay as they were.
    """
    values = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if not (f.metadata.get("later") and getattr(config, f.name) == f.default)
    }
    return {name: _json_value(value) for name, value in values.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, Record):
        return to_json(value)
    if is_dataclass(value):
        return _to_json(value)
    return [_json_value(part) for part in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class BlockConfig:
    """One pre-norm block: attention (or none), then an MLP of width mlp_dim or a Soft MoE.

    residual says whether the MLP or Soft MoE is added to its input or replaces it; attention
    always has a residual.
    """

    attention: bool = True
    mlp_dim: int | None = None
    soft_moe: SoftMoEConfig | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        require_bool(self, "attention", "residual")
        if (self.mlp_dim is None) == (self.soft_moe is None):
            raise MoepruneError("a block has either `mlp_dim` or `soft_moe`, never both or none")
        if self.mlp_dim is not None:
            require_positive(self, "mlp_dim")


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer in which some blocks have a Soft MoE; images (b,c,H,W) in, logits out.

    num_classes: 0 where there is no head, so that pooled features come out.
    pooling: over the patch tokens (`mean`), or takes the class token (`token`); with `none` every
        token, the class token too, gives logits.
    class_position: whether the class token has a row of its own in the position embedding.
    embedding_norm: a norm follows the position embedding, and patches are embedded without a bias.
    final_norm, head_norm: a norm before and one after the pooling.
    qk_norm: queries and keys are normalised, each head by itself.
    qkv_bias: queries, keys and values have a bias.
    layer_scale: learned factors scale what attention and the MLP or Soft MoE give, channel by channel.
    norm_eps: of every norm.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_channels: int
    num_classes: int
    dim: int
    num_heads: int
    blocks: tuple[BlockConfig, ...]
    class_token: bool = False
    pooling: str = "mean"
    final_norm: bool = True
    class_position: bool = later(True)
    embedding_norm: bool = later(False)
    head_norm: bool = later(False)
    qk_norm: bool = later(False)
    qkv_bias: bool = later(True)
    layer_scale: bool = later(False)
    norm_eps: float = later(1e-5)

    def __post_init__(self) -> None:
        require_positive(self, "in_channels", "dim", "num_heads")
        if self.num_classes != 0:
            require_positive(self, "num_classes")
        require_bool(self, *(f.name for f in fields(self) if f.type == "bool"))
        require_choice(self, "pooling", POOLINGS)
        if type(self.norm_eps) is not float or not 0 < self.norm_eps < 1:
            raise MoepruneError(f"`norm_eps` is {self.norm_eps!r}, expected a number in 0…1")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size < patch or size % patch:
                raise MoepruneError(
                    f"`image_size` {list(self.image_size)} is not a multiple of"
                    f" `patch_size` {list(self.patch_size)}"
                )
        if self.dim % self.num_heads:
            raise MoepruneError(f"`dim` {self.dim} is not a multiple of `num_heads` {self.num_heads}")
        if self.pooling == "token" and not self.class_token:
            raise MoepruneError("`pooling` token needs `class_token` true")
        if not self.class_position and not self.class_token:
            raise MoepruneError("`class_position` false needs `class_token` true")
        for block in self.blocks:
            for width in (block.soft_moe.dim, block.soft_moe.output_width) if block.soft_moe else ():
                if width != self.dim:
                    raise MoepruneError(f"a Soft MoE of `dim` {width} stands in a model of `dim` {self.dim}")

    @property
    def num_patches(self) -> int:
        """Of one image."""
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
    def moe_layers(self) -> dict[str, SoftMoEConfig]:
        """The Soft MoE layers by name, in the order of the data flow."""
        return {
            f"blocks.{index}.soft_moe": block.soft_moe
            for index, block in enumerate(self.blocks)
            if block.soft_moe is not None
        }

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image (c,H,W)."""
        return self.in_channels, *self.image_size

    @property
    def libraries(self) -> tuple[str, ...]:
        """None: the whole model is ours."""
        return ()

    @property
    def outputs_per_input(self) -> int:
        """Rows of logits that the model returns for one image: one, or one per token without pooling."""
        return self.num_tokens if self.pooling == "none" else 1

    def tokens(self, name: str) -> int:
        """Return m, which is the same in every layer."""
        return self.num_tokens

    def flops(self, plan: Plan, usage: Mapping[str, Usage] | None = None) -> Flops:
        """Return the FLOPs of one image; see `ModelConfig.flops`."""
        usage = usage or {}
        m, d = self.num_tokens, self.dim
        embedding = 2 * self.num_patches * self._pixels * d
        flops = Flops(other=embedding + 2 * self.outputs_per_input * d * self.num_classes)
        for block in self.blocks:
            attention = 8 * m * d * d + 4 * m * m * d if block.attention else 0
            flops += Flops(other=attention + 4 * m * d * (block.mlp_dim or 0))
        for name, layer in self.moe_layers.items():
            flops += layer.flops(m, plan.get(name), usage.get(name))
        return flops

    def shapes(self, plan: Plan) -> Shapes:
        """Return the shape of every tensor of the model."""
        d = self.dim
        shapes = _linear("patch_embed", self._pixels, d, bias=not self.embedding_norm)
        shapes["position"] = (self.num_positions, d)
        if self.class_token:
            shapes["class_token"] = (1, d)
        if self.embedding_norm:
            shapes |= _norm("embedding_norm", d)
        for index, block in enumerate(self.blocks):
            shapes |= self._block_shapes(f"blocks.{index}", block)
        shapes |= _layer_shapes(self.moe_layers, plan)
        if self.final_norm:
            shapes |= _norm("norm", d)
        if self.head_norm:
            shapes |= _norm("head_norm", d)
        return shapes | (_linear("head", d, self.num_classes) if self.num_classes else {})

    def _block_shapes(self, name: str, block: BlockConfig) -> Shapes:
        """The shapes of a block without its Soft MoE."""
        d = self.dim
        shapes = _norm(f"{name}.norm2", d)
        if block.attention:
            shapes |= _norm(f"{name}.norm1", d)
            shapes |= _linear(f"{name}.attention.qkv", d, 3 * d, bias=self.qkv_bias)
            shapes |= _linear(f"{name}.attention.proj", d, d)
        if block.attention and self.qk_norm:
            shapes |= _norm(f"{name}.attention.q_norm", d // self.num_heads)
            shapes |= _norm(f"{name}.attention.k_norm", d // self.num_heads)
        if self.layer_scale:
            shapes[f"{name}.mixer_scale"] = (d,)
            if block.attention:
                shapes[f"{name}.attention_scale"] = (d,)
        if block.mlp_dim is not None:
            shapes |= _linear(f"{name}.mlp.0", d, block.mlp_dim)
            shapes |= _linear(f"{name}.mlp.2", block.mlp_dim, d)
        return shapes

    @property
    def _pixels(self) -> int:
        """Values of one patch."""
        return self.in_channels * self.patch_size[0] * self.patch_size[1]

    def covers(self, tensor: str) -> bool:
        """Return True: all tensors are known beforehand."""
        return True

    def build(self, plan: Plan, details: Details = Details(), factory: Factory | None = None) -> Model:
        """Return the model on the meta device; see `ModelConfig.build`."""
        if factory is not None:
            raise MoepruneError(
                "the architecture is in the checkpoint: it needs no `--model`", "omit `--model`"
            )
        from moeprune.models.vit import skeleton

        return skeleton(self, plan, details)

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values; `architecture_from_json` reads it back."""
        return {"type": "vit", **_to_json(self)}


def vit_from_json(value: Any) -> ViTConfig:
    """Read a ViTConfig from JSON values.

    Raises:
        MoepruneError: an unknown type, an unknown or missing key, or a value that does not fit.
    """
    values = _mapping(value, "architecture")
    if values.pop("type", None) != "vit":
        raise MoepruneError(
            f"architecture: `type` is {_mapping(value, 'architecture').get('type')!r}, expected 'vit'",
            "the checkpoint was written by a newer moeprune, or not by moeprune at all",
        )
    blocks = values.get("blocks")
    if not isinstance(blocks, list | tuple):
        raise MoepruneError("architecture: `blocks` is missing or no list")
    values["blocks"] = tuple(_block_from_json(block, i) for i, block in enumerate(blocks))
    for key in ("image_size", "patch_size"):
        size = values.get(key)
        if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(s) is int for s in size)):
            raise MoepruneError(f"architecture: `{key}` is {size!r}, expected [height, width]")
        values[key] = tuple(size)
    return _build(ViTConfig, values, "architecture")


def _block_from_json(value: Any, index: int) -> BlockConfig:
    where = f"architecture: blocks[{index}]"
    values = _mapping(value, where)
    if values.get("soft_moe") is not None:
        soft_moe = _mapping(values["soft_moe"], f"{where}.soft_moe")
        values["soft_moe"] = layer_from_json(soft_moe, f"{where}.soft_moe")
    return _build(BlockConfig, values, where)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise MoepruneError(f"{where}: found {type(value).__name__}, expected an object")
    return dict(value)


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise MoepruneError(f"{where}: unknown keys {unknown}, expected {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:  # a missing key
        raise MoepruneError(f"{where}: {error}") from None
    except MoepruneError as error:
        raise MoepruneError(f"{where}: {error.message}", error.hint) from None


@dataclass(frozen=True)
class AdoptedLayer:
    """A Soft MoE layer that took the place of another library's.

    layer: what it is. library: whose it was. tokens: m, of an input of the model's input_shape.
    """

    layer: LayerConfig
    library: str
    tokens: int


@dataclass(frozen=True)
class ModuleConfig:
    """A model of the user's own code whose Soft MoE layers were adopted.

    factory: `package.module:function` that builds the model as it was before, or None if it is not
        known. arguments: keyword arguments of the factory, JSON values.
    input_shape: of one input (c,H,W). num_classes: of its output.
    layers: the adopted layers by name, in the order of the data flow.
    other_flops: FLOPs of one input outside of them.
    """

    factory: str | None
    arguments: dict[str, Any]
    input_shape: tuple[int, int, int]
    num_classes: int
    layers: dict[str, AdoptedLayer]
    other_flops: int

    @property
    def moe_layers(self) -> Mapping[str, LayerConfig]:
        """The Soft MoE layers by name, in the order of the data flow."""
        return {name: layer.layer for name, layer in self.layers.items()}

    @property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that the layers were from."""
        return tuple(sorted({layer.library for layer in self.layers.values()}))

    @property
    def outputs_per_input(self) -> int:
        """One: such models return logits (b,classes)."""
        return 1

    def tokens(self, name: str) -> int:
        """Return m, the tokens of one input that reach an MoE layer."""
        return self.layers[name].tokens

    def flops(self, plan: Plan, usage: Mapping[str, Usage] | None = None) -> Flops:
        """Return the FLOPs of one input; see `ModelConfig.flops`."""
        usage, flops = usage or {}, Flops(other=self.other_flops)
        for name, layer in self.layers.items():
            flops += layer.layer.flops(layer.tokens, plan.get(name), usage.get(name))
        return flops

    def shapes(self, plan: Plan) -> Shapes:
        """Return the shape of every tensor of the MoE layers."""
        return _layer_shapes(self.moe_layers, plan)

    def covers(self, tensor: str) -> bool:
        """Return True for the tensors of MoE layers."""
        return tensor.rpartition(".")[0] in self.layers

    def build(self, plan: Plan, details: Details = Details(), factory: Factory | None = None) -> Model:
        """Run the factory and put MoE layers into its model; see `ModelConfig.build`."""
        name = self.factory or "package.module:function"
        if factory is None or (isinstance(factory, str) and self.factory not in (None, factory)):
            stated = "none is given" if factory is None else f"given is `{factory}`"
            raise MoepruneError(
                f"the model is built by the factory `{name}`, {stated}",
                f"if you trust that code, add `--model {name}`",
            )
        from moeprune.models.module import skeleton

        return skeleton(self, plan, details, factory)

    def to_json(self) -> dict[str, Any]:
        """Return the config as JSON values; `architecture_from_json` reads it back."""
        layers = {name: {**vars(layer), "layer": to_json(layer.layer)} for name, layer in self.layers.items()}
        return {"type": "module", **_to_json(self), "layers": layers}


def module_from_json(value: Any) -> ModuleConfig:
    """Read a ModuleConfig from JSON values.

    Raises:
        MoepruneError: an unknown or missing key, or a value that does not fit.
    """
    values = _mapping(value, "architecture")
    values.pop("type", None)
    factory, arguments = values.get("factory"), _mapping(values.get("arguments"), "architecture: arguments")
    if not (factory is None or isinstance(factory, str)) or not all(isinstance(k, str) for k in arguments):
        raise MoepruneError("architecture: `factory` or `arguments` are damaged")
    shape = values.get("input_shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(s) is int and s > 0 for s in shape)):
        raise MoepruneError(f"architecture: `input_shape` is {shape!r}, expected [channels, height, width]")
    values["input_shape"] = tuple(shape)
    for key in ("num_classes", "other_flops"):
        if type(values.get(key)) is not int or not 0 <= values[key] < 2**63:
            raise MoepruneError(f"architecture: `{key}` is {values.get(key)!r}, expected a whole number")
    layers = {}
    for name, layer in _mapping(values.get("layers"), "architecture: layers").items():
        where = f"architecture: layers: {name}"
        parts = _mapping(layer, where)
        parts["layer"] = layer_from_json(parts.get("layer"), where)
        layers[name] = _build(AdoptedLayer, parts, where)
        require_positive(layers[name], "tokens")
    values["layers"] = layers
    return _build(ModuleConfig, values, "architecture")


def _layer_shapes(layers: Mapping[str, LayerConfig], plan: Plan) -> Shapes:
    return {
        f"{name}.{tensor}": shape
        for name, layer in layers.items()
        for tensor, shape in layer.shapes(plan.get(name)).items()
    }


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def require_positive(config: Any, *names: str) -> None:
    """Raise a MoepruneError unless the named fields are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise MoepruneError(f"`{name}` is {value!r}, expected a whole number of at least 1")


def require_bool(config: Any, *names: str) -> None:
    """Raise a MoepruneError unless the named fields are true or false."""
    for name in names:
        if type(getattr(config, name)) is not bool:
            raise MoepruneError(f"`{name}` is {getattr(config, name)!r}, expected true or false")


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise a MoepruneError unless the named field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise MoepruneError(f"`{name}` is {value!r}, expected one of {', '.join(choices)}")
