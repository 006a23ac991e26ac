"""Layers of soft-mixture-of-experts (fkodom): no normalisation, and an expert is one linear.

In its encoder layers the Soft MoE stands in place of an MLP's second linear: it takes tokens of the
hidden width and gives tokens of the model's width. Release 0.1 takes the dispatch softmax over the batch
(a mistake, mended in 0.2), so that what it gives for one input depends on the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.modules import class_name, installed_version

LIBRARY = "soft-mixture-of-experts"
PACKAGE = "soft_mixture_of_experts"


def recognises(module: nn.Module) -> bool:
    """Whether a module is a layer of this library."""
    return class_name(module) == f"{PACKAGE}.soft_moe.SoftMoE"


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
        MoepruneError: a release is installed that computes something else, and the user does not name it.
    """
    is_over_batch = f"{version or installed_version(LIBRARY)}.".startswith("0.1.")
    if is_over_batch and version is None:
        raise MoepruneError(
            f"layer `{name}` is of {LIBRARY} {installed_version(LIBRARY)}, whose dispatch softmax runs over"
            " the batch: what it gives for one input depends on the others",
            "install release 0.2.0 or newer, or, if the model was trained so and is to run so, say it with"
            f" `--source {LIBRARY}==0.1.0`",
        )
    tensors = dict(module.state_dict())
    d, n, p = tensors["phi"].shape
    weight = tensors["experts.weight"].mT.contiguous()  # (n,out,in)
    out = weight.shape[1]
    bias = tensors.get("experts.bias")
    config = SoftMoEConfig(
        d, n, p, None, "none", "raw", "linear", None if out == d else out,
        dispatch_over="batch" if is_over_batch else "tokens",
    )  # fmt: skip
    return config, {
        "phi": tensors["phi"],
        "fc2_weight": weight,
        "fc2_bias": torch.zeros_like(weight[:, :, 0]) if bias is None else bias,
    }


def restore(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of our layer by the library's names.

    Args:
        module: a layer of the library, whose structure is taken.
        tensors: of our layer, unpruned or with fewer experts.
    """
    restored = {"phi": tensors["phi"], "experts.weight": tensors["fc2_weight"].mT.contiguous()}
    if "experts.bias" in module.state_dict():
        restored["experts.bias"] = tensors["fc2_bias"]
    return restored


def rename_old_keys(tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """The tensors as they are: this library never renamed them."""
    return dict(tensors)
