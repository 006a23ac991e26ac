"""Experts of other libraries, one module each, as stacked weights and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError

PASSIVE = (nn.Dropout, nn.Identity)


def class_name(module: nn.Module) -> str:
    """Return the full name of a module's class, such as `soft_moe.soft_moe.SoftMoELayerWrapper`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def stack_experts(experts: nn.ModuleList, name: str) -> tuple[str, int, dict[str, Tensor]]:
    """Return the kind of a layer's experts (`mlp` or `geglu`), their hidden width, and their stacked tensors.

    Raises:
        MoepruneError: they are anything else than linear, GELU or GEGLU, linear.
    """
    pairs = []
    gated = False
    for index, expert in enumerate(experts):
        linears = [part for _, part in _linears(expert)]
        others = [
            part for part in expert.modules()
            if not any(part.children()) and not isinstance(part, (nn.Linear, *PASSIVE))
        ]  # fmt: skip
        activation = others[0] if len(others) == 1 else None
        gated = type(activation).__name__ == "GEGLU"
        is_gelu = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if len(linears) != 2 or not (gated or is_gelu) or any(linear.bias is None for linear in linears):
            parts = ", ".join(str(part) for part in [*linears, *others])
            raise MoepruneError(
                f"expert `{name}.{index}` is made of {parts}: expected two linears with biases, and a GELU or"
                " GEGLU between them"
            )
        pairs.append(linears)
    first, second = zip(*pairs, strict=True)
    return (
        "geglu" if gated else "mlp",
        second[0].in_features,
        {
            "fc1_weight": torch.stack([linear.weight.T for linear in first]),
            "fc1_bias": torch.stack([linear.bias for linear in first]),
            "fc2_weight": torch.stack([linear.weight for linear in second]),
            "fc2_bias": torch.stack([linear.bias for linear in second]),
        },
    )


def unstack_experts(tensors: Mapping[str, Tensor], prefix: str, expert: nn.Module) -> dict[str, Tensor]:
    """Return the stacked tensors of our layer as those of modules `{prefix}.0`, `{prefix}.1`, ...

    Args:
        expert: a module of which each expert is one.
    """
    unstacked = {}
    for fc, (path, _) in zip(("fc1", "fc2"), _linears(expert), strict=True):
        for j, bias in enumerate(tensors[f"{fc}_bias"]):
            weight = tensors[f"{fc}_weight"][j]
            unstacked[f"{prefix}.{j}.{path}.weight"] = weight.T.contiguous() if fc == "fc1" else weight
            unstacked[f"{prefix}.{j}.{path}.bias"] = bias
    return unstacked


def _linears(expert: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of one expert by their path in it, in the order of the data flow."""
    return [(path, part) for path, part in expert.named_modules() if isinstance(part, nn.Linear)]
