"""The tensors that a model of an architecture and a plan has: their names and shapes, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.files.header import FLOATS, TensorInfo
from moeprune.layers.config import Shapes
from moeprune.models.architecture import ModuleConfig, ViTConfig
from moeprune.plan import Plan


def tensor_shapes(config: ViTConfig, plan: Plan) -> Shapes:
    """The shape of each tensor of a model by its name in the model's `state_dict`."""
    d, (patch_height, patch_width) = config.dim, config.patch_size
    pixels = config.in_channels * patch_height * patch_width
    shapes = _linear("patch_embed", pixels, d, bias=not config.embedding_norm)
    if config.class_token:
        shapes["class_token"] = (1, d)
    shapes["position"] = (config.num_positions, d)
    if config.embedding_norm:
        shapes |= _norm("embedding_norm", d)
    for index, block in enumerate(config.blocks):
        name = f"blocks.{index}"
        if block.attention:
            shapes |= _norm(f"{name}.norm1", d)
            shapes |= _linear(f"{name}.attention.qkv", d, 3 * d, bias=config.qkv_bias)
            shapes |= _linear(f"{name}.attention.proj", d, d)
            if config.qk_norm:
                shapes |= _norm(f"{name}.attention.q_norm", d // config.num_heads)
                shapes |= _norm(f"{name}.attention.k_norm", d // config.num_heads)
            if config.layer_scale:
                shapes[f"{name}.attention_scale"] = (d,)
        shapes |= _norm(f"{name}.norm2", d)
        if config.layer_scale:
            shapes[f"{name}.mixer_scale"] = (d,)
        if block.mlp_dim is not None:
            shapes |= _linear(f"{name}.mlp.0", d, block.mlp_dim)
            shapes |= _linear(f"{name}.mlp.2", block.mlp_dim, d)
        if block.soft_moe is not None:
            layer = f"{name}.soft_moe"
            of_layer = block.soft_moe.shapes(plan.get(layer))
            shapes |= {f"{layer}.{tensor}": shape for tensor, shape in of_layer.items()}
    if config.final_norm:
        shapes |= _norm("norm", d)
    if config.head_norm:
        shapes |= _norm("head_norm", d)
    return shapes | (_linear("head", d, config.num_classes) if config.num_classes else {})


def layer_shapes(config: ViTConfig | ModuleConfig, plan: Plan) -> Shapes:
    """The shape of each tensor of the Soft MoE layers alone, by its name in the model."""
    return {
        f"{name}.{tensor}": shape
        for name, layer in config.moe_layers.items()
        for tensor, shape in layer.shapes(plan.get(name)).items()
    }


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def part_of(name: str, layers: Container[str]) -> str:
    """What a tensor of a model with these Soft MoE layers serves: `experts`, `routing`, `compensation`
    or `other`.
    """
    module, _, tensor = name.rpartition(".")
    if module not in layers:
        return "other"
    if tensor.startswith("fc"):
        return "experts"
    is_compensation = tensor in ("surrogate", "basis") or tensor.startswith("affine")
    return "compensation" if is_compensation else "routing"


def differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """In words, what is missing, unexpected, or of another shape; sorted by name within each."""
    both = sorted(set(found) & set(expected))
    return [
        *(f"missing `{name}`" for name in sorted(set(expected) - set(found))),
        *(f"unexpected `{name}`" for name in sorted(set(found) - set(expected))),
        *(
            f"`{name}` is {list(found[name])}, expected {list(expected[name])}"
            for name in both
            if tuple(found[name]) != tuple(expected[name])
        ),
    ]


def require_tensors(found: Mapping[str, TensorInfo], expected: Shapes, path: str | Path) -> None:
    """Raise a MoepruneError that lists all missing and unexpected tensors, wrong shapes and types."""
    problems = differences({name: info.shape for name, info in found.items()}, expected)
    problems += [
        f"`{name}` has the type {found[name].dtype}, expected floats"
        for name in sorted(set(found) & set(expected))
        if found[name].dtype not in FLOATS
    ]
    if problems:
        raise MoepruneError(f"`{path}` does not fit its own architecture: {'; '.join(problems)}")


def require_one_type(tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Raise a MoepruneError that names the tensors whose type is not that of most of them.

    Scores (`score_weights`) are float32 beside weights of any type.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("score_weights")}
    [(usual, _)] = Counter(tensor.dtype for tensor in weights.values()).most_common(1)
    if odd := [f"`{name}` is {t.dtype}" for name, t in sorted(weights.items()) if t.dtype != usual]:
        raise MoepruneError(
            f"`{path}` has tensors of several types: {', '.join(odd)}, the others are {usual}",
            "convert the model to one type, for example with `model.float()`",
        )
