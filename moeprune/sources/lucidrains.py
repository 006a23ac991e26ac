"""Layers of soft-moe-pytorch (lucidrains): RMSNorm or LayerNorm on tokens and slots, dispatch of the normed.

`SoftMoE` takes tokens, images and single tokens, with a padding mask; its experts are MLPs or GEGLUs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.architecture import SoftMoEConfig
from moeprune.errors import MoepruneError
from moeprune.sources.modules import class_name, expert_linears, stack_experts, unstack_experts

LIBRARY = "soft-moe-pytorch"
PACKAGE = "soft_moe_pytorch"


def recognises(module: nn.Module) -> bool:
    """Whether a module is a layer of this library."""
    return class_name(module) in (
        f"{PACKAGE}.soft_moe.SoftMoE",
        f"{PACKAGE}.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE",
    )


def describe(module: nn.Module, name: str) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
    """The layer as ours, and its tensors by our names.

    Raises:
        MoepruneError: the layer cannot be expressed.
    """
    if class_name(module).endswith("DynamicSlotsSoftMoE"):
        raise MoepruneError(
            f"layer `{name}` is a DynamicSlotsSoftMoE: its slots are made anew from each input's tokens, and"
            " the number of experts sets how they are pooled, so that no expert can be left out",
            "train with soft-moe-pytorch's `SoftMoE` to prune the model",
        )
    tensors = dict(module.state_dict())
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


def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our layer by the library's names.

    Args:
        module: a layer of the library, whose structure is taken.
        tensors: of our layer, unpruned or with fewer experts.
    """
    names = {"input_gain": "norm.gamma", "phi_gain": "slot_norm.gamma"}
    restored = {theirs: tensors[ours] for ours, theirs in names.items()}
    restored["slot_embeds"] = tensors["phi"].permute(1, 2, 0).contiguous()
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
