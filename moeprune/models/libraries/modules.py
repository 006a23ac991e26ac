"""Experts of other libraries: modules of one MLP each, as stacked weights and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError

PASSIVE = (nn.Dropout, nn.Identity)


def class_name(module: nn.Module) -> str:
    """The full name of a module's class, such as `soft_moe.soft_moe.SoftMoELayerWrapper`."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def installed_version(distribution: str) -> str | None:
    """The version of a library in this environment."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def expert_linears(expert: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of one expert by their path in it, in the order of the data flow."""
    return [(path, part) for path, part in expert.named_modules() if isinstance(part, nn.Linear)]


def stack_experts(experts: Iterable[nn.Module], name: str) -> tuple[str, int, dict[str, Tensor]]:
    """What the experts of a layer are (`mlp` or `geglu`), their hidden width, and their stacked tensors.

    Raises:
        MoepruneError: they are something else than linear, GELU or GEGLU, linear.
    """
    pairs = []
    gated = False
    for index, expert in enumerate(experts):
        linears = [part for _, part in expert_linears(expert)]
        others = [
            part for part in expert.modules()
            if not any(part.children()) and not isinstance(part, (nn.Linear, *PASSIVE))
        ]  # fmt: skip
        [activation] = others if len(others) == 1 else [nn.Identity()]
        gated = type(activation).__name__ == "GEGLU"
        is_gelu = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if len(linears) != 2 or not (gated or is_gelu) or linears[0].bias is None or linears[1].bias is None:
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
            "fc1_weight": torch.stack([linear.weight.detach().T for linear in first]),
            "fc1_bias": torch.stack([linear.bias.detach() for linear in first]),
            "fc2_weight": torch.stack([linear.weight.detach() for linear in second]),
            "fc2_bias": torch.stack([linear.bias.detach() for linear in second]),
        },
    )


def unstack_experts(tensors: Mapping[str, Tensor], first: str, second: str) -> dict[str, Tensor]:
    """The stacked tensors as those of one expert each.

    Args:
        tensors: of our layer.
        first: name of an expert's first linear, with `{}` for the expert's index. second: likewise.
    """
    unstacked = {}
    for j in range(len(tensors["fc2_weight"])):
        unstacked[f"{first.format(j)}.weight"] = tensors["fc1_weight"][j].T.contiguous()
        unstacked[f"{first.format(j)}.bias"] = tensors["fc1_bias"][j]
        unstacked[f"{second.format(j)}.weight"] = tensors["fc2_weight"][j]
        unstacked[f"{second.format(j)}.bias"] = tensors["fc2_bias"][j]
    return unstacked
