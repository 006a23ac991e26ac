"""Layers of soft-moe-pytorch (lucidrains): RMSNorm or LayerNorm on tokens and slots.

`SoftMoE` takes tokens, images and single tokens, with a padding mask; its experts are MLPs or GEGLUs.
`DynamicSlotsSoftMoE` makes its slots from the input's own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.experts import class_name, stack_experts, unstack_experts
from moeprune.models.libraries.interface import LayerLibrary

CLASSES = (
    "soft_moe_pytorch.soft_moe.SoftMoE",
    "soft_moe_pytorch.soft_moe_with_dynamic_slots.DynamicSlotsSoftMoE",
)


class SoftMoEPytorch(LayerLibrary):
    """Layers of both classes."""

    name = "soft-moe-pytorch"

    def recognises(self, module: nn.Module) -> bool:
        """Return True for a layer of this library."""
        return class_name(module) in CLASSES

    def describe(
        self, module: nn.Module, name: str, tokens: int, version: str | None
    ) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
        """Return our config and tensors; see `LayerLibrary.describe`."""
        found = module.state_dict()
        _, modules = _experts(module)
        kind, hidden_dim, experts = stack_experts(modules, f"{name}.experts")
        if "slot_embeds" not in found:
            projection = found["to_slot_embeds.0.weight"]  # (n·d,d)
            d = projection.shape[1]
            n = len(projection) // d
            slots = -(-tokens // n)  # rounded up
            config = SoftMoEConfig(d, n, slots, hidden_dim, "rms", "normalized", kind, dynamic_slots=True)
            return config, experts | {
                "slot_projection": projection.unflatten(0, (n, d)),
                "input_gain": found["norm.gamma"],
                "phi_gain": found["to_slot_embeds.2.gamma"],
            }
        if any(found[key].any() for key in ("norm.beta", "slot_norm.beta") if key in found):
            raise MoepruneError(
                f"layer `{name}` has a `beta` that is not zero, which moeprune cannot express"
            )
        n, p, d = found["slot_embeds"].shape
        norm = "layer" if "norm.beta" in found else "rms"
        return SoftMoEConfig(d, n, p, hidden_dim, norm, "normalized", kind), experts | {
            "phi": found["slot_embeds"].permute(2, 0, 1).contiguous(),
            "input_gain": found["norm.gamma"],
            "phi_gain": found["slot_norm.gamma"],
        }

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the library's names; see `LayerLibrary.restore`."""
        restored = {"norm.gamma": tensors["input_gain"]}
        if "slot_projection" in tensors:
            restored["to_slot_embeds.0.weight"] = tensors["slot_projection"].flatten(0, 1)
            restored["to_slot_embeds.2.gamma"] = tensors["phi_gain"]
        else:
            restored["slot_embeds"] = tensors["phi"].permute(1, 2, 0).contiguous()
            restored["slot_norm.gamma"] = tensors["phi_gain"]
        if "norm.beta" in module.state_dict():
            zero = torch.zeros_like(tensors["input_gain"])
            restored |= {"norm.beta": zero, "slot_norm.beta": zero.clone()}
        prefix, experts = _experts(module)
        return restored | unstack_experts(tensors, prefix, experts[0])

    def rename(self, tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
        """Return the tensors; those of old releases are `experts.j`, the newer ones `experts.experts.j`."""
        renamed = {}
        for name, tensor in tensors.items():
            newer = re.sub(r"\bexperts\.(?=\d)", "experts.experts.", name)
            renamed[newer if name not in expected and newer in expected else name] = tensor
        return renamed


def _experts(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of experts, and its path in a layer."""
    return next(
        (path, part)
        for path, part in module.named_modules()
        if isinstance(part, nn.ModuleList) and path.endswith("experts")
    )
