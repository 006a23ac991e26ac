"""Whole models of `soft-moe` (bwconrad): vision transformers built on timm's, with Soft MoEs for some MLPs; no torch.

Two layouts are read: the library's, with one MLP for each expert, and that of the paper's authors, who
stacked the experts of a layer for their ImageNet models, gave them a width of their own, and left a
`base_expert` in the file that never runs. Only the library's layout is written.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import asdict, astuple

from moeprune.errors import MoepruneError
from moeprune.files.header import TensorInfo
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.description import require_tensors
from moeprune.records import Record, from_json

logger = logging.getLogger(__name__)

Tensors = Mapping[str, TensorInfo]  # of a file by name
MAX_SIZES = 6  # of images that an error lists
EPS = 1e-6  # of norms, unless the model was built with another norm layer
POOLINGS: dict[str, Literal["token", "mean", "none"]] = {"token": "token", "avg": "mean", "": "none"}
"""Ours by the library's `global_pool`."""
LAYER = re.compile(r"blocks\.(\d+)\.mlp\.(phi$|experts\.|stacked_expert_)")
UNUSED = re.compile(r"blocks\.\d+\.mlp\.base_expert\.")
Sides = int | tuple[int, int] | str  # a side such as 224, or height and width such as (192, 256) or `192x256`
NAMES = {
    "class_token": "cls_token", "position": "pos_embed", "patch_embed": "patch_embed.proj",
    "embedding_norm": "norm_pre", "head_norm": "fc_norm", "attention": "attn", "attention_scale": "ls1.gamma",
    "mixer_scale": "ls2.gamma", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "soft_moe": "mlp",
}  # fmt: skip
"""The library's names of parts by ours, if different."""
_OURS = re.compile(rf"(?:^|(?<=\.))({'|'.join(map(re.escape, NAMES))})(?=\.|$)")


class Entry(NamedTuple):
    """One of our tensors, and the library's tensors that hold the same values."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]  # of each of theirs
    transposed: bool = False  # their last two axes are swapped in ours
    split: bool = False  # there is one tensor for each expert; ours is the stack of them


class Layout(NamedTuple):
    """The model in a file."""

    config: ViTConfig
    entries: list[Entry]
    arguments: dict[str, Any]  # of the library's own constructor, as JSON values
    defaults: dict[str, Any]  # those of them that neither the tensors nor the user determine
    dropped: list[str]  # tensors that the model does not use


class SoftMoEViTs:
    """The library's whole models; a further library provides the same.

    name: on PyPI and on the command line. model_class: loads what is written. anchor: a tensor that each model has.
    """

    name = "soft-moe"
    anchor = re.compile(r"blocks\.\d+\.mlp\.phi")
    model_class = "soft_moe.SoftMoEVisionTransformer"

    def fits(self, tensors: Tensors) -> bool:
        """Return True if the names of the tensors are the library's: a block has a phi and experts."""
        found = {match.groups() for name in tensors if (match := LAYER.match(name))}
        return any((index, "phi") in found for index, part in found if part != "phi")

    def read(self, tensors: Tensors, given: Mapping[str, Any], path: str) -> Layout:
        """Return the layout of a file; given: arguments of the constructor, which the tensors do not show.

        Raises:
            MoepruneError: tensors are missing, unexpected or contradict each other; an argument is
                unknown, missing, or does not fit the tensors.
        """
        dropped = sorted(name for name in tensors if UNUSED.match(name))
        used = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        stacked = any("stacked_expert_" in name for name in used)
        draft = draft_config(used, path)
        expected = {name: entry.shape for entry in self.entries(draft, stacked) for name in entry.theirs}
        require_tensors(used, expected, f"the tensors of `{path}` are not those of a whole model")
        config, defaults = complete(draft, given, path)
        arguments = self.arguments(config)
        assumed = {name: arguments[name] for name in defaults}
        return Layout(config, self.entries(config, stacked), arguments, assumed, dropped)

    def refusals(self, config: ViTConfig) -> list[str]:
        """Return every reason why the library cannot express a dense model of this architecture."""
        refused = [f"block {i} has no attention" for i, block in enumerate(config.blocks) if not block.attention]
        without = [i for i, block in enumerate(config.blocks) if not block.residual]
        refused += [f"block {i} has no residual around its MLP or Soft MoE" for i in without]
        for name, layer in config.moe_layers.items():
            normalize = layer.router_norm != "none"
            known = SoftMoEConfig(
                layer.dim, layer.num_experts, layer.slots_per_expert, layer.expert_width,
                router_norm="l2" if normalize else "none",
                dispatch_input="normalized" if normalize else layer.dispatch_input,  # the same tokens
            )  # fmt: skip
            refused += [
                f"layer `{name}` has `{key}` {value}, expected {expected}"
                for (key, value), expected in zip(asdict(layer).items(), astuple(known), strict=True)
                if value != expected
            ]
        if config.final_norm == config.head_norm:
            both = "both" if config.final_norm else "neither"
            refused.append(f"the model has {both} of `final_norm` and `head_norm`, expected one")
        layers = config.moe_layers.values()
        numbers = {
            "experts": {layer.num_experts for layer in layers},
            "slots per expert": {layer.slots_per_expert for layer in layers},
            "hidden units of MLPs and experts": _mlp_widths(config) | {layer.expert_width for layer in layers},
        }
        return refused + [
            f"the number of {what} is not the same everywhere: {or_(sorted(values))}"
            for what, values in numbers.items()
            if len(values) > 1
        ]

    def entries(self, config: ViTConfig, stacked: bool = False) -> list[Entry]:
        """Return all tensors of a dense model; stacked: with one tensor for the experts of a layer."""
        entries = []
        for ours, shape in config.shapes({}).items():
            theirs = _OURS.sub(lambda match: NAMES[match[0]], ours)
            part, _, tensor = theirs.rpartition(".")
            if ours in ("class_token", "position"):
                entries.append(Entry(ours, (theirs,), (1, *shape)))
            elif ours == "patch_embed.weight":
                entries.append(Entry(ours, (theirs,), (config.dim, config.in_channels, *config.patch_size)))
            elif ours.rpartition(".")[0] not in config.moe_layers or not tensor.startswith("fc"):
                entries.append(Entry(ours, (theirs,), shape))
            else:
                n, *rest = shape
                transposed = tensor == "fc1_weight"
                one = tuple(reversed(rest) if transposed else rest)
                names = tuple(f"{part}.experts.{j}.{tensor.replace('_', '.')}" for j in range(n))
                whole = Entry(ours, (f"{part}.stacked_expert_{tensor}",), (n, *one), transposed)
                entries.append(whole if stacked else Entry(ours, names, one, transposed, split=True))
        return entries

    def arguments(self, config: ViTConfig) -> dict[str, Any]:
        """Return the arguments of the constructor; where layers differ, a list of their values."""
        layers = config.moe_layers.values()
        experts = {layer.expert_width for layer in layers}
        mlps = _mlp_widths(config) or experts
        indices = [index for index, block in enumerate(config.blocks) if block.soft_moe is not None]
        is_tail = indices == list(range(indices[0], len(config.blocks)))
        arguments = {
            "num_experts": _common(layer.num_experts for layer in layers),
            "slots_per_expert": _common(layer.slots_per_expert for layer in layers),
            "moe_layer_index": indices[0] if is_tail else indices,
            "img_size": _side(config.image_size),
            "patch_size": _side(config.patch_size),
            "in_chans": config.in_channels,
            "num_classes": config.num_classes,
            "global_pool": next(theirs for theirs, ours in POOLINGS.items() if ours == config.pooling),
            "embed_dim": config.dim,
            "depth": len(config.blocks),
            "num_heads": config.num_heads,
            "mlp_ratio": _common(_ratio(width, config.dim) for width in mlps),
            "qkv_bias": config.qkv_bias,
            "qk_norm": config.qk_norm,
            "init_values": 1.0 if config.layer_scale else None,
            "class_token": config.class_token,
            "no_embed_class": config.class_token and not config.class_position,
            "pre_norm": config.embedding_norm,
            "fc_norm": config.head_norm,
            "act_layer": "GELU",
            "eps": config.norm_eps,
            "normalize": _common(layer.router_norm == "l2" for layer in layers),
        }
        if experts != mlps:
            arguments["moe_mlp_ratio"] = _common(_ratio(width, config.dim) for width in experts)
        return arguments

    def build(self, config: ViTConfig) -> Any:
        """Return the library's own model of an architecture that it can express, or raise an ImportError."""
        from soft_moe import SoftMoEVisionTransformer

        others = ("act_layer", "eps", "normalize")  # of its layers
        arguments = {name: value for name, value in self.arguments(config).items() if name not in others}
        model = SoftMoEVisionTransformer(weight_init="skip", **arguments)
        for module in model.modules():
            if hasattr(module, "eps"):  # a norm
                module.eps = config.norm_eps
        for block, ours in zip(model.blocks, config.blocks, strict=True):
            if ours.soft_moe is not None and ours.soft_moe.router_norm == "none":
                block.mlp.normalize = False  # an argument of the layer, which the model's does not set
                del block.mlp.scale
        return model


class Arguments(Record, frozen=True):
    """Arguments of the library's constructor that the tensors do not show."""

    num_heads: int | None = None
    global_pool: Literal["token", "avg", ""] | None = None
    img_size: Sides | None = None
    no_embed_class: bool | None = None
    act_layer: Literal["GELU"] = "GELU"
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
    }
    if draft.class_token and "no_embed_class" in given:
        choices["no_embed_class"] = sorted({not has for has in sizes.values()})
    values = {"eps": EPS} | {name: of[0] for name, of in choices.items() if len(of) == 1}
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
    completed = draft.replace(
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


def _mlp_widths(config: ViTConfig) -> set[int]:
    return {block.mlp_dim for block in config.blocks if block.mlp_dim is not None}


def _ratio(width: int, dim: int) -> float:
    """The `mlp_ratio` from which the library, which rounds down, makes this width."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else (width + 0.5) / dim


def _common(values: Iterable[Any]) -> Any:
    """The value that all have in common, or the list of different ones."""
    different = sorted(set(values))
    return different[0] if len(different) == 1 else different


def _side(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
