"""`soft-moe` (bwconrad, on PyPI): vision transformers built on timm's, some of their MLPs a Soft MoE.

Two layouts are read: the library's, one MLP an expert, and that of the paper's authors, who stacked the
experts of a layer for their ImageNet models, gave them a width of their own, and left a `base_expert` in the
file that runs never. Only the library's is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import msgspec

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.architecture import BlockConfig, ViTConfig
from moeprune.models.libraries.checks import require_entries
from moeprune.models.libraries.given import (
    Parser,
    count,
    flag,
    in_words,
    number,
    one_of,
    optional,
    parse_given,
    size,
)
from moeprune.models.libraries.interface import Entry, Reading, Tensors

EPS = 1e-6
"""Of norms, unless the model was built with another norm layer."""

_POOLINGS = {"token": "token", "avg": "mean", "": "none"}
_PHI = re.compile(r"blocks\.(\d+)\.mlp\.phi")
_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.(experts\.\d+\.fc1\.|stacked_expert_fc1_)weight")
_LAYER = re.compile(r"blocks\.(\d+)\.mlp\.(phi$|experts\.|stacked_expert_)")
_UNUSED = re.compile(r"blocks\.\d+\.mlp\.base_expert\.")


class SoftMoEPackage:
    """The library, as moeprune.models.libraries.interface.Source."""

    name = "soft-moe"
    distribution = "soft-moe"
    model_class = "soft_moe.SoftMoEVisionTransformer"

    def fits(self, tensors: Tensors) -> bool:
        """Whether there are blocks with a phi and experts beside it."""
        routers, experts = (
            {match[1] for name in tensors if (match := pattern.fullmatch(name))}
            for pattern in (_PHI, _EXPERT)
        )
        return bool(routers & experts)

    def read(self, tensors: Tensors, given: Mapping[str, str], path: str) -> Reading:
        """See Source.read."""
        arguments = parse_given(given, _PARSERS)
        dropped = sorted(name for name in tensors if _UNUSED.match(name))
        used = {name: tensor for name, tensor in tensors.items() if name not in dropped}
        stacked = any("stacked_expert_" in name for name in used)
        draft = _draft(used, path)
        require_entries(used, list(_entries(draft, stacked)), path)
        config, defaults = _complete(draft, arguments, path)
        _require_agreement(arguments, config, self.arguments(config), path)
        return Reading(
            config,
            list(_entries(config, stacked)),
            self.arguments(config),
            {name: self.arguments(config)[name] for name in defaults},
            dropped,
            as_is=not stacked and not dropped,
        )

    def refusals(self, config: ViTConfig) -> list[str]:
        """See Source.refusals."""
        refused = []
        for index, block in enumerate(config.blocks):
            if not block.attention:
                refused.append(f"block {index} has no attention")
            if not block.residual:
                refused.append(f"block {index} has no residual around its MLP or Soft MoE")
        for name, layer in config.moe_layers.items():
            for key, (value, known) in _differences(layer).items():
                refused.append(f"layer `{name}` has `{key}` {value}, expected {known}")
        if config.final_norm == config.head_norm:
            both = "both" if config.final_norm else "neither"
            refused.append(f"{both} of `final_norm` and `head_norm` are there, expected one")
        hidden_dims = {*_hidden_dims(config, True), *_hidden_dims(config, False)}
        for what, values in (
            ("experts", {layer.num_experts for layer in config.moe_layers.values()}),
            ("slots an expert", {layer.slots_per_expert for layer in config.moe_layers.values()}),
            ("hidden units of MLPs and experts", hidden_dims),
        ):
            if len(values) > 1:
                refused.append(f"the number of {what} is not the same everywhere: {in_words(sorted(values))}")
        return refused

    def entries(self, config: ViTConfig) -> list[Entry]:
        """See Source.entries."""
        return list(_entries(config, stacked=False))

    def arguments(self, config: ViTConfig) -> dict[str, Any]:
        """See Source.arguments; where layers differ, a list of what they have."""
        layers = config.moe_layers
        mlp_ratio, moe_mlp_ratio = (
            _one(_ratio(h, config.dim) for h in _hidden_dims(config, of_experts))
            for of_experts in (False, True)
        )
        indices = [int(name.split(".")[1]) for name in layers]
        is_tail = indices == list(range(indices[0], len(config.blocks)))
        arguments = {
            "num_experts": _one(layer.num_experts for layer in layers.values()),
            "slots_per_expert": _one(layer.slots_per_expert for layer in layers.values()),
            "moe_layer_index": indices[0] if is_tail else indices,
            "img_size": _side(config.image_size),
            "patch_size": _side(config.patch_size),
            "in_chans": config.in_channels,
            "num_classes": config.num_classes,
            "global_pool": next(theirs for theirs, ours in _POOLINGS.items() if ours == config.pooling),
            "embed_dim": config.dim,
            "depth": len(config.blocks),
            "num_heads": config.num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": config.qkv_bias,
            "qk_norm": config.qk_norm,
            "init_values": 1.0 if config.layer_scale else None,
            "class_token": config.class_token,
            "no_embed_class": config.class_token and not config.class_position,
            "pre_norm": config.embedding_norm,
            "fc_norm": config.head_norm,
            "act_layer": "GELU",
            "eps": config.norm_eps,
            "normalize": _one(layer.router_norm == "l2" for layer in layers.values()),
        }
        return arguments if moe_mlp_ratio == mlp_ratio else arguments | {"moe_mlp_ratio": moe_mlp_ratio}

    def build(self, config: ViTConfig) -> Any:
        """See Source.build."""
        from soft_moe import SoftMoEVisionTransformer

        arguments = self.arguments(config)
        for name in ("act_layer", "eps", "normalize"):
            del arguments[name]
        model = SoftMoEVisionTransformer(weight_init="skip", **arguments)
        for module in model.modules():
            if hasattr(module, "eps"):  # a norm
                module.eps = config.norm_eps
        for block, ours in zip(model.blocks, config.blocks, strict=True):
            if ours.soft_moe is not None and ours.soft_moe.router_norm == "none":
                block.mlp.normalize = False  # of the layer's constructor; the model's cannot set it
                del block.mlp.scale
        return model


def _entries(config: ViTConfig, stacked: bool) -> Iterator[Entry]:
    """All tensors of a model, in the order of the data flow."""
    d, (patch_height, patch_width) = config.dim, config.patch_size
    phi = next(iter(config.moe_layers)).replace("soft_moe", "mlp.phi")
    patches = (d, config.in_channels, patch_height, patch_width)
    if config.class_token:
        yield Entry("class_token", ("cls_token",), (1, 1, d), phi)
    yield Entry("position", ("pos_embed",), (1, config.num_positions, d), phi)
    yield Entry("patch_embed.weight", ("patch_embed.proj.weight",), patches, phi)
    if config.embedding_norm:
        yield from _pair("embedding_norm", "norm_pre", (d,), phi)
    else:
        yield Entry("patch_embed.bias", ("patch_embed.proj.bias",), (d,), phi)
    for index, block in enumerate(config.blocks):
        name = f"blocks.{index}"
        yield from _pair(f"{name}.norm1", f"{name}.norm1", (d,), phi)
        ours, theirs = f"{name}.attention", f"{name}.attn"
        yield from _pair(f"{ours}.qkv", f"{theirs}.qkv", (3 * d, d), phi, bias=config.qkv_bias)
        if config.qk_norm:
            for norm in ("q_norm", "k_norm"):
                like = f"blocks.0.attn.{norm}.weight"
                yield from _pair(f"{ours}.{norm}", f"{theirs}.{norm}", (d // config.num_heads,), like)
        yield from _pair(f"{ours}.proj", f"{theirs}.proj", (d, d), phi)
        if config.layer_scale:
            yield Entry(f"{name}.attention_scale", (f"{name}.ls1.gamma",), (d,), phi)
        yield from _pair(f"{name}.norm2", f"{name}.norm2", (d,), phi)
        if block.soft_moe is not None:
            yield from _layer_entries(block.soft_moe, name, phi, stacked)
        elif h := block.mlp_dim:
            like = f"{name}.mlp.fc1.weight"
            yield from _pair(f"{name}.mlp.0", f"{name}.mlp.fc1", (h, d), like)
            yield from _pair(f"{name}.mlp.2", f"{name}.mlp.fc2", (d, h), like)
        if config.layer_scale:
            yield Entry(f"{name}.mixer_scale", (f"{name}.ls2.gamma",), (d,), phi)
    if config.final_norm:
        yield from _pair("norm", "norm", (d,), phi)
    if config.head_norm:
        yield from _pair("head_norm", "fc_norm", (d,), phi)
    if config.num_classes:
        yield from _pair("head", "head", (config.num_classes, d), "head.weight")


def _layer_entries(layer: SoftMoEConfig, block: str, first_phi: str, stacked: bool) -> Iterator[Entry]:
    d, n, p, h = layer.dim, layer.num_experts, layer.slots_per_expert, layer.expert_width
    ours, theirs = f"{block}.soft_moe", f"{block}.mlp"
    yield Entry(f"{ours}.phi", (f"{theirs}.phi",), (d, n, p), first_phi)
    if layer.router_norm == "l2":
        yield Entry(f"{ours}.scale", (f"{theirs}.scale",), (1,), f"{theirs}.phi")
    for tensor, shape, transposed in (
        ("fc1_weight", (h, d), True),
        ("fc1_bias", (h,), False),
        ("fc2_weight", (d, h), False),
        ("fc2_bias", (d,), False),
    ):
        names: tuple[str, ...]
        if stacked:
            names, shape = (f"{theirs}.stacked_expert_{tensor}",), (n, *shape)
            like = f"{theirs}.stacked_expert_fc1_weight"
        else:
            names = tuple(f"{theirs}.experts.{j}.{tensor.replace('_', '.')}" for j in range(n))
            like = f"{theirs}.experts.0.fc1.weight"
        yield Entry(f"{ours}.{tensor}", names, shape, like, transposed, split=not stacked)


def _pair(ours: str, theirs: str, shape: tuple[int, ...], like: str, bias: bool = True) -> Iterator[Entry]:
    """A weight, and a bias as long as the weight's first axis."""
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",), shape, like)
    if bias:
        yield Entry(f"{ours}.bias", (f"{theirs}.bias",), shape[:1], like)


def _differences(layer: SoftMoEConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of a layer that the library does not have, and what it has."""
    norm = layer.router_norm if layer.router_norm in ("l2", "none") else "l2 or none"
    fields = msgspec.structs.fields(layer)
    known = {f.name: getattr(layer, f.name) if f.default is msgspec.NODEFAULT else f.default for f in fields}
    known |= {"router_norm": norm, "dispatch_input": "normalized"}
    if layer.router_norm == "none":  # raw or not, tokens are the same
        known["dispatch_input"] = layer.dispatch_input
    found = {name: (getattr(layer, name), value) for name, value in known.items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def _draft(tensors: Tensors, path: str) -> ViTConfig:
    """What the tensors alone say, where they do not contradict each other; the patches as one column."""
    if empty := [f"`{name}` {list(t.shape)}" for name, t in sorted(tensors.items()) if 0 in t.shape]:
        raise MoepruneError(f"tensors of `{path}` have no elements: {', '.join(empty)}")
    layers = sorted({int(match[1]) for name in tensors if (match := _LAYER.match(name))})
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
    if dim % head_dim:
        raise MoepruneError(
            f"`{path}`: `blocks.0.attn.q_norm.weight` [{head_dim}] does not divide the width {dim} of"
            f" `{first_phi}`"
        )
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
    hidden_dim = _axis(tensors, stacked, 1, default=_axis(tensors, f"{first}.fc1.weight", 0))
    num_experts = _axis(tensors, stacked, 0, default=max(1, len(experts)))
    return BlockConfig(
        soft_moe=SoftMoEConfig(
            dim,
            _axis(tensors, f"{name}.phi", 1, default=num_experts),
            _axis(tensors, f"{name}.phi", 2),
            hidden_dim,
            router_norm="l2" if f"{name}.scale" in tensors else "none",
        )
    )


def _axis(tensors: Tensors, name: str, axis: int, default: int = 1) -> int:
    """A size of a tensor; the default where there is none, which is found and told later."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if axis < len(shape) else default


def _complete(draft: ViTConfig, given: Mapping[str, Any], path: str) -> tuple[ViTConfig, list[str]]:
    """The draft with what its tensors cannot tell, and the names of what was taken from the defaults."""
    asked: dict[str, str] = {}
    defaults = [name for name in ("act_layer", "eps") if name not in given]
    heads = draft.num_heads
    if not draft.qk_norm:
        fitting = [h for h in range(1, draft.dim + 1) if draft.dim % h == 0]
        if "num_heads" not in given:
            asked["num_heads"] = in_words(fitting)
        elif (heads := given["num_heads"]) not in fitting:
            raise MoepruneError(
                f"`--source-arg num_heads={heads}` does not divide the width {draft.dim} of the tensors of"
                f" `{path}`",
                f"give one of {in_words(fitting)}",
            )
    pooling = given.get("global_pool")
    if pooling is None:
        asked["global_pool"] = in_words(name for name in _POOLINGS if name != "token" or draft.class_token)
    elif pooling == "token" and not draft.class_token:
        raise MoepruneError(
            f"`--source-arg global_pool=token` needs a class token, but `{path}` has no `cls_token`",
            "give global_pool=avg or global_pool=",
        )
    grids = _grids(draft, given.get("no_embed_class"))
    if not grids:
        raise MoepruneError(
            f"`--source-arg no_embed_class=false`, but `pos_embed` of `{path}` has one row: none for a patch"
        )
    image_size = given.get("img_size") or _square(draft, grids)
    if image_size is None:
        asked["img_size"] = in_words(_image_sizes(draft, grids))
    elif "img_size" not in given:
        defaults.append("img_size")
    if asked:
        listed = ", ".join(f"`{name}` ({choices})" for name, choices in asked.items())
        raise MoepruneError(
            f"the tensors of `{path}` cannot tell all of its model; missing, with what fits: {listed}",
            f"say how it was built: `{' '.join(f'--source-arg {name}=...' for name in asked)}`",
        )
    assert image_size is not None
    assert pooling is not None
    patches = _num_patches(draft, image_size, path)
    if patches not in grids:
        of_class = {True: " and one for the class token", False: " and none for the class token"}
        rows = " or ".join(
            f"for {n} patches{of_class[has] if draft.class_token else ''}" for n, has in grids.items()
        )
        raise MoepruneError(
            f"`img_size` {list(image_size)} makes {patches} patches of {list(draft.patch_size)}, but"
            f" `pos_embed` of `{path}` has {draft.num_positions} rows: {rows}"
        )
    completed = replace(
        draft,
        image_size=image_size,
        num_heads=heads,
        pooling=_POOLINGS[pooling],
        class_position=grids[patches],
        norm_eps=given.get("eps", EPS),
    )
    return completed, defaults


def _grids(draft: ViTConfig, no_embed_class: bool | None) -> dict[int, bool]:
    """How many patches may stand behind the rows of the position embedding, and whether the class token
    then has a row too.
    """
    rows = draft.num_positions
    if not draft.class_token:
        return {rows: True}
    both = {rows - 1: True, rows: False}
    return {n: has for n, has in both.items() if n > 0 and no_embed_class in (None, not has)}


def _square(draft: ViTConfig, grids: Iterable[int]) -> tuple[int, int] | None:
    """The square image that has as many patches as one of these numbers; there is at most one."""
    height, width = draft.patch_size
    for patches in grids:
        side = isqrt(patches * height * width)
        if side * side == patches * height * width and side % height == side % width == 0:
            return side, side
    return None


def _image_sizes(draft: ViTConfig, grids: Iterable[int]) -> list[str]:
    """All images that have as many patches as one of these numbers, such as `32x80`."""
    height, width = draft.patch_size
    return [
        f"{rows * height}x{patches // rows * width}"
        for patches in grids
        for rows in range(1, patches + 1)
        if patches % rows == 0
    ]


def _num_patches(draft: ViTConfig, image_size: tuple[int, int], path: str) -> int:
    for side, patch in zip(image_size, draft.patch_size, strict=True):
        if side % patch or side < patch:
            raise MoepruneError(
                f"`--source-arg img_size` {list(image_size)} is not a multiple of the patches"
                f" {list(draft.patch_size)} of `patch_embed.proj.weight` in `{path}`",
                "the library leaves out what is over at the right and bottom: give the size without it",
            )
    return image_size[0] // draft.patch_size[0] * (image_size[1] // draft.patch_size[1])


def _require_agreement(
    given: Mapping[str, Any], config: ViTConfig, arguments: dict[str, Any], path: str
) -> None:
    """Raise a MoepruneError that names every given argument that the tensors contradict."""
    wrong = []
    for name, value in given.items():
        said: Any = arguments.get(name, arguments["mlp_ratio"])
        if name in ("img_size", "patch_size"):
            value = _side(value)
        elif name == "moe_layer_index":
            said = [index for index, block in enumerate(config.blocks) if block.soft_moe is not None]
            value = sorted(value) if isinstance(value, list) else list(range(value, len(config.blocks)))
        elif name in ("mlp_ratio", "moe_mlp_ratio"):
            value = (
                said if int(config.dim * value) in _hidden_dims(config, name == "moe_mlp_ratio") else value
            )
        elif name == "init_values":
            value, said = (None if v is None else "a number" for v in (value, said))
        elif name == "fc_norm" and value is None:
            value = config.pooling == "mean"
        elif name == "no_embed_class" and not config.class_token:
            continue  # there is no class token to embed
        if value != said:
            wrong.append(f"`--source-arg {name}` says {value!r}, the tensors {said!r}")
    if wrong:
        raise MoepruneError(
            f"`{path}` is contradicted: {'; '.join(wrong)}", "leave out what the tensors tell"
        )


def _hidden_dims(config: ViTConfig, of_experts: bool) -> list[int]:
    """Different widths of the experts, or of the MLPs; if there are none of the one, of the other."""
    of_mlps = {block.mlp_dim for block in config.blocks if block.mlp_dim is not None}
    experts = {layer.expert_width for layer in config.moe_layers.values()}
    return sorted(experts if of_experts or not of_mlps else of_mlps)


def _one(values: Iterable[Any]) -> Any:
    """The value that all have in common, or the list of different ones."""
    different = sorted(set(values))
    return different[0] if len(different) == 1 else different


def _side(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _ratio(hidden_dim: int, dim: int) -> float:
    """The `mlp_ratio` from which the library, which rounds down, makes this width."""
    ratio = hidden_dim / dim
    return ratio if int(dim * ratio) == hidden_dim else (hidden_dim + 0.5) / dim


def _parse_index(text: str) -> int | list[int]:
    indices = [count(part) for part in text.strip("[]").split(",")]
    return indices[0] if len(indices) == 1 and not text.startswith("[") else indices


def _parse_eps(text: str) -> float:
    value = number(text)
    if not 0 < value < 1:
        raise ValueError("expected a number between 0 and 1")
    return value


_PARSERS: dict[str, Parser] = {
    **dict.fromkeys(("num_experts", "slots_per_expert", "in_chans", "num_classes"), count),
    **dict.fromkeys(("embed_dim", "depth", "num_heads"), count),
    **dict.fromkeys(("img_size", "patch_size"), size),
    **dict.fromkeys(("qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "normalize"), flag),
    **dict.fromkeys(("mlp_ratio", "moe_mlp_ratio"), number),
    "moe_layer_index": _parse_index,
    "global_pool": one_of(*_POOLINGS),
    "init_values": optional(number),
    "fc_norm": optional(flag),
    "act_layer": one_of("GELU"),
    "eps": _parse_eps,
}
