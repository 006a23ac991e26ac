"""The architecture of a ViT of `soft-moe`, from the tensors of its file and arguments of its constructor; no torch."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta

from moeprune.errors import MoepruneError
from moeprune.files.header import TensorInfo
from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.interface import Activation
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.records import Record, from_json

logger = logging.getLogger(__name__)

Tensors = Mapping[str, TensorInfo]  # of a file by name
MAX_SIZES = 6  # of images that an error lists
EPS = 1e-6  # of norms, unless the model was built with another norm layer
POOLINGS: dict[str, Literal["token", "mean", "none"]] = {"token": "token", "avg": "mean", "": "none"}
"""Ours by the library's `global_pool`."""
ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "ReLU": "relu", "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu", "ELU": "elu", "SELU": "selu", "SiLU": "silu", "Hardswish": "hardswish", "Mish": "mish",
    "Softplus": "softplus", "Tanh": "tanh", "Sigmoid": "sigmoid", "Identity": "identity",
}  # fmt: skip
"""Ours by the library's `act_layer`, a class of torch.nn or timm.layers."""
LAYER = re.compile(r"blocks\.(\d+)\.mlp\.(phi$|experts\.|stacked_expert_)")
Sides = int | tuple[int, int] | str  # a side such as 224, or height and width such as (192, 256) or `192x256`


class Arguments(Record, frozen=True):
    """Arguments of the library's constructor that the tensors do not show."""

    num_heads: int | None = None
    global_pool: Literal["token", "avg", ""] | None = None
    img_size: Sides | None = None
    no_embed_class: bool | None = None
    act_layer: str = "GELU"
    eps: Annotated[float, Meta(gt=0, lt=1)] = EPS


def draft_config(tensors: Tensors, path: str) -> ViTConfig:
    """Return the config as far as the tensors determine it; all patches are in one column."""
    if empty := [f"`{name}` {list(t.shape)}" for name, t in sorted(tensors.items()) if 0 in t.shape]:
        raise MoepruneError(f"tensors of `{path}` have no elements: {', '.join(empty)}")
    layers = sorted({int(match[1]) for name in tensors if (match := LAYER.match(name))})
    if not layers:
        raise MoepruneError(f"no Soft MoE layer in `{path}`: it has no tensor `blocks.0.mlp.phi` or the like")
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name))
    if depth > len(tensors):
        raise MoepruneError(f"`{path}` has a block {depth - 1}, but only {len(tensors)} tensors")
    first_phi = f"blocks.{layers[0]}.mlp.phi"
    dim = _axis(tensors, first_phi, 0, default=_axis(tensors, "patch_embed.proj.weight", 0))
    in_channels, *patch = (_axis(tensors, "patch_embed.proj.weight", axis) for axis in (1, 2, 3))
    class_token = "cls_token" in tensors
    rows = _axis(tensors, "pos_embed", 1)
    class_position = class_token and rows > 1
    head_dim = _axis(tensors, "blocks.0.attn.q_norm.weight", 0, default=dim)
    head_dim = dim if dim % head_dim else head_dim  # which the norm does not fit then
    return ViTConfig(
        image_size=((rows - class_position) * patch[0], patch[1]),
        patch_size=(patch[0], patch[1]),
        in_channels=in_channels,
        num_classes=_axis(tensors, "head.weight", 0, default=_axis(tensors, "head.bias", 0, default=0)),
        dim=dim,
        num_heads=dim // head_dim,
        blocks=tuple(_block(tensors, index, dim, index in layers) for index in range(depth)),
        class_token=class_token,
        pooling="none",
        final_norm="fc_norm.weight" not in tensors,
        class_position=class_position or not class_token,
        embedding_norm="norm_pre.weight" in tensors,
        head_norm="fc_norm.weight" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        norm_eps=EPS,
    )


def _block(tensors: Tensors, index: int, dim: int, is_moe: bool) -> BlockConfig:
    name = f"blocks.{index}.mlp"
    if not is_moe:
        of_bias = _axis(tensors, f"{name}.fc1.bias", 0)
        return BlockConfig(mlp_dim=_axis(tensors, f"{name}.fc1.weight", 0, default=of_bias))
    experts = {key.split(".")[4] for key in tensors if key.startswith(f"{name}.experts.")}
    stacked, first = f"{name}.stacked_expert_fc1_weight", f"{name}.experts.{min(experts, default=0)}"
    num_experts = _axis(tensors, stacked, 0, default=max(1, len(experts)))
    soft_moe = SoftMoEConfig(
        dim,
        num_experts=_axis(tensors, f"{name}.phi", 1, default=num_experts),
        slots_per_expert=_axis(tensors, f"{name}.phi", 2),
        hidden_dim=_axis(tensors, stacked, 1, default=_axis(tensors, f"{first}.fc1.weight", 0)),
        router_norm="l2" if f"{name}.scale" in tensors else "none",
    )
    return BlockConfig(soft_moe=soft_moe)


def _axis(tensors: Tensors, name: str, axis: int, default: int = 1) -> int:
    """Return a size of a tensor, or the default if it is missing, which is reported later."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if axis < len(shape) else default


def complete(draft: ViTConfig, arguments: Mapping[str, Any], path: str) -> tuple[ViTConfig, list[str]]:
    """Return the completed draft, and the names of arguments left at their defaults."""
    checked: Arguments = from_json(dict(arguments), Arguments, "`--source-arg`")
    given = {name: getattr(checked, name) for name in arguments}
    if given.get("img_size") is not None:
        given["img_size"] = _sides(given["img_size"])
    heads = [h for h in range(1, draft.dim + 1) if draft.dim % h == 0]
    sizes = _image_sizes(draft, given.get("no_embed_class"))
    choices: dict[str, list[Any]] = {
        "num_heads": [draft.num_heads] if draft.qk_norm else heads,
        "global_pool": [name for name in POOLINGS if name != "token" or draft.class_token],
        "img_size": list(sizes),
        "act_layer": list(ACTIVATIONS),
    }
    if draft.class_token and "no_embed_class" in given:
        choices["no_embed_class"] = sorted({not has for has in sizes.values()})
    values: dict[str, Any] = {"eps": EPS, "act_layer": "GELU"} | {
        name: of[0] for name, of in choices.items() if len(of) == 1
    }
    is_stated = given.get("no_embed_class") is not None  # if not, r·(r+2) patches with the class token are r+1 squared
    if square := [size for size, has in sizes.items() if size[0] == size[1] and (has or is_stated)]:
        [values["img_size"]] = square
    values |= given
    expected = {
        name: or_(_size_names(sizes, draft.class_token) if name == "img_size" else choices[name])
        for name in choices
        if values.get(name) not in choices[name]
    }
    if wrong := [f"`{name}` is {given[name]!r}, expected {expected[name]}" for name in expected if name in given]:
        raise MoepruneError(f"arguments do not fit the tensors of `{path}`: {'; '.join(wrong)}")
    if expected:
        missing = ", ".join(f"`{name}` ({choices})" for name, choices in expected.items())
        raise MoepruneError(
            f"the tensors of `{path}` do not determine its model; missing arguments: {missing}",
            f"give their values: `{' '.join(f'--source-arg {name}=...' for name in expected)}`",
        )
    activation = ACTIVATIONS[values["act_layer"]]
    completed = draft.replace(
        activation=activation,
        blocks=tuple(
            block.replace(soft_moe=block.soft_moe.replace(activation=activation)) if block.soft_moe else block
            for block in draft.blocks
        ),
        image_size=values["img_size"],
        num_heads=values["num_heads"],
        pooling=POOLINGS[values["global_pool"]],
        class_position=sizes[values["img_size"]],
        norm_eps=values["eps"],
    )
    assumed = {"act_layer", "eps", "img_size"} - set(given)
    if "img_size" in assumed:
        assumed |= {"no_embed_class"} if draft.class_token and not is_stated else set()
        (high, wide), also = values["img_size"], {of: True for of in sizes if min(of) < max(of) <= 2 * min(of)}
        if also:
            logger.warning(
                f"`{path}` is read as a model of images of {high}x{wide}, but its tensors also fit"
                f" {or_(_size_names(also, False))}; name one with `--source-arg img_size=...`"
            )
    return completed, sorted(assumed)


def _size_names(sizes: Mapping[tuple[int, int], bool], has_class_token: bool) -> list[str]:
    """Return the sizes in words, the nearest to a square first, and how many are left out."""
    names = [
        f"{high}x{wide}{'' if sizes[high, wide] or not has_class_token else ' with no_embed_class=true'}"
        for high, wide in sorted(sizes, key=lambda of: max(of) / min(of))
    ]
    return names if len(names) <= MAX_SIZES else [*names[:MAX_SIZES], f"one of {len(names) - MAX_SIZES} others"]


def _image_sizes(draft: ViTConfig, no_embed_class: bool | None) -> dict[tuple[int, int], bool]:
    """Return all image sizes that fit the position embedding, each with True if a row of that is the class token's."""
    rows, (height, width) = draft.num_positions, draft.patch_size
    counts = {rows - 1: True, rows: False} if draft.class_token else {rows: True}
    stated = {n: has for n, has in counts.items() if n and no_embed_class == (not has)}
    return {
        (high * height, n // high * width): has
        for n, has in (stated or counts).items()
        for high in range(1, n + 1)
        if n % high == 0
    }


def _sides(size: Sides) -> Any:
    """Return height and width; other texts are returned unchanged."""
    if isinstance(size, str) and re.fullmatch(r"\d{1,9}(x\d{1,9})?", size):
        size = tuple(map(int, size.split("x")))  # type: ignore[assignment]
    return size if isinstance(size, str) else (size, size) if isinstance(size, int) else (size[0], size[-1])


def or_(choices: Iterable[object]) -> str:
    """Return the choices in words, such as `token, avg or ''`."""
    *others, last = [str(choice) or "''" for choice in choices]
    return f"{', '.join(others)} or {last}" if others else last
