"""Whole models of `soft-moe` (bwconrad): vision transformers built on timm's, with Soft MoEs for some MLPs; no torch.

Two layouts are read: the library's, with one MLP for each expert, and that of the paper's authors, who
stacked the experts of a layer for their ImageNet models, gave them a width of their own, and left a
`base_expert` in the file that never runs. Only the library's layout is written.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from msgspec.structs import asdict, astuple

from moeprune.layers.config import SoftMoEConfig
from moeprune.layers.interface import Activation
from moeprune.models.architecture import ViTConfig
from moeprune.models.description import require_tensors
from moeprune.models.libraries.soft_moe_config import ACTIVATIONS, LAYER, POOLINGS, Tensors, complete, draft_config, or_

UNUSED = re.compile(r"blocks\.\d+\.mlp\.base_expert\.")
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
                activation=layer.activation if layer.activation in ACTIVATIONS.values() else "gelu",
            )  # fmt: skip
            refused += [
                f"layer `{name}` has `{key}` {value}, expected {expected}"
                for (key, value), expected in zip(asdict(layer).items(), astuple(known), strict=True)
                if value != expected
            ]
        if config.final_norm == config.head_norm:
            both = "both" if config.final_norm else "neither"
            refused.append(f"the model has {both} of `final_norm` and `head_norm`, expected one")
        layers, mlps = config.moe_layers.values(), _mlp_widths(config)
        common: dict[str, set[Any]] = {
            "number of experts": {layer.num_experts for layer in layers},
            "number of slots per expert": {layer.slots_per_expert for layer in layers},
            "number of hidden units of MLPs and experts": mlps | {layer.expert_width for layer in layers},
            "activation of MLPs and experts": {config.activation for _ in mlps} | {of.activation for of in layers},
        }
        return refused + [
            f"the {what} is not the same everywhere: {or_(sorted(values))}"
            for what, values in common.items()
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
            "act_layer": _common(_act_layer(layer.activation) for layer in layers),
            "eps": config.norm_eps,
            "normalize": _common(layer.router_norm == "l2" for layer in layers),
        }
        if experts != mlps:
            arguments["moe_mlp_ratio"] = _common(_ratio(width, config.dim) for width in experts)
        return arguments

    def build(self, config: ViTConfig) -> Any:
        """Return the library's own model of an architecture that it can express, or raise an ImportError."""
        import torch
        from soft_moe import SoftMoEVisionTransformer
        from timm import layers

        others = ("eps", "normalize")  # of its layers
        arguments = {name: value for name, value in self.arguments(config).items() if name not in others}
        act_layer = arguments["act_layer"]
        arguments["act_layer"] = getattr(torch.nn, act_layer, None) or getattr(layers, act_layer)
        model = SoftMoEVisionTransformer(weight_init="skip", **arguments)
        for module in model.modules():
            if hasattr(module, "eps"):  # a norm
                module.eps = config.norm_eps
        for block, ours in zip(model.blocks, config.blocks, strict=True):
            if ours.soft_moe is not None and ours.soft_moe.router_norm == "none":
                block.mlp.normalize = False  # an argument of the layer, which the model's does not set
                del block.mlp.scale
        return model


def _mlp_widths(config: ViTConfig) -> set[int]:
    return {block.mlp_dim for block in config.blocks if block.mlp_dim is not None}


def _act_layer(activation: Activation) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


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
