"""Layers of soft-moe-pytorch (lucidrains): RMSNorm or LayerNorm on tokens and slots, dispatch of the normed.

`SoftMoE` takes tokens, images and single tokens, with a padding mask; its experts are MLPs or GEGLUs.
`DynamicSlotsSoftMoE` makes its slots of the input's own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.modules import class_name, expert_linears, stack_experts, unstack_experts

LIBRARY = "soft-moe-pytorch"
PACKAGE = "soft_moe_pytorch"


def recognises(module: nn.Module) -> bool:
    """Whether a module is a layer of this library."""
    return class_name(module) in (
        f"{PACKAGE}.soft_moe.SoftMoE",
        f"{PACKAGE}.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE",
    )


def describe(
    module: nn.Module, name: str, tokens: int, version: str | None
) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
    """The layer as ours, and its tensors by our names.

    Args:
        module: a layer of the library.
        name: of the layer.
        tokens: m, of an input.
        version: of the library, where the user names it.

    Raises:
        MoepruneError: the layer cannot be expressed.
    """
    tensors = dict(module.state_dict())
    if "slot_embeds" not in tensors:
        return _describe_dynamic(module, name, tokens)
    n, p, d = tensors["slot_embeds"].shape
    with_layernorm = "norm.beta" in tensors
    if with_layernorm and (tensors["norm.beta"].any() or tensors["slot_norm.beta"].any()):
        raise MoepruneError(f"layer `{name}` has a `beta` that is not zero, which moeprune cannot express")
    kind, hidden_dim, experts = stack_experts(_experts(module), f"{name}.experts")
    config = SoftMoEConfig(d, n, p, hidden_dim, "layer" if with_layernorm else "rms", "normalized", kind)
    return config, {
        "phi": tensors["slot_embeds"].permute(2, 0, 1).contiguous(),
        "input_gain": tensors["norm.gamma"],
        "phi_gain": tensors["slot_norm.gamma"],
        **experts,
    }


def _describe_dynamic(module: nn.Module, name: str, tokens: int) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
    tensors = dict(module.state_dict())
    projection = tensors["to_slot_embeds.0.weight"]  # (n·d,d)
    d = projection.shape[1]
    n = len(projection) // d
    kind, hidden_dim, experts = stack_experts(_experts(module), f"{name}.experts")
    config = SoftMoEConfig(d, n, -(-tokens // n), hidden_dim, "rms", "normalized", kind, dynamic_slots=True)
    return config, {
        "slot_projection": projection.unflatten(0, (n, d)),
        "input_gain": tensors["norm.gamma"],
        "phi_gain": tensors["to_slot_embeds.2.gamma"],
        **experts,
    }


def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our layer by the library's names.

    Args:
        module: a layer of the library, whose structure is taken.
        tensors: of our layer, unpruned or with fewer experts.
    """
    restored = {"norm.gamma": tensors["input_gain"]}
    if "slot_projection" in tensors:
        restored["to_slot_embeds.0.weight"] = tensors["slot_projection"].flatten(0, 1)
        restored["to_slot_embeds.2.gamma"] = tensors["phi_gain"]
    else:
        restored["slot_embeds"] = tensors["phi"].permute(1, 2, 0).contiguous()
        restored["slot_norm.gamma"] = tensors["phi_gain"]
    if "norm.beta" in module.state_dict():
        restored |= {
            f"{norm}.beta": torch.zeros_like(tensors["input_gain"]) for norm in ("norm", "slot_norm")
        }
    experts = _experts(module)
    [prefix] = [path for path, part in module.named_modules() if part is experts]
    first, second = (path for path, _ in expert_linears(experts[0]))
    return restored | unstack_experts(tensors, f"{prefix}.{{}}.{first}", f"{prefix}.{{}}.{second}")


def rename_old_keys(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Tensors of old releases, whose experts are `experts.j`, by the newer names `experts.experts.j`."""
    renamed = {}
    for name, tensor in tensors.items():
        newer = re.sub(r"\bexperts\.(?=\d)", "experts.experts.", name)
        renamed[newer if name not in expected and newer in expected else name] = tensor
    return renamed


def _experts(module: nn.Module) -> nn.ModuleList:
    experts = module.experts
    if not isinstance(experts, nn.ModuleList):
        experts = experts.experts  # type: ignore[union-attr]
    assert isinstance(experts, nn.ModuleList)
    return experts
