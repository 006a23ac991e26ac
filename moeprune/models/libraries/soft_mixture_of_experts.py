"""Layers of soft-mixture-of-experts (fkodom): no normalisation, and an expert is one linear.

In the library's encoder, the Soft MoE takes the place of an MLP's second linear: its input has the hidden
width, its output the model's width. Release 0.1 takes the dispatch softmax over the batch (a mistake,
corrected in 0.2), so that the output for one input depends on the others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.layers.config import SoftMoEConfig
from moeprune.models.libraries.experts import class_name
from moeprune.models.libraries.interface import LayerLibrary, installed_version


class SoftMixtureOfExperts(LayerLibrary):
    """Layers of all releases."""

    name = "soft-mixture-of-experts"

    def recognises(self, module: nn.Module) -> bool:
        """Return True for a layer of this library."""
        return class_name(module) == "soft_mixture_of_experts.soft_moe.SoftMoE"

    def describe(
        self, module: nn.Module, name: str, tokens: int, version: str | None
    ) -> tuple[SoftMoEConfig, dict[str, Tensor]]:
        """Return our config and tensors; see `LayerLibrary.describe`.

        Raises:
            MoepruneError: release 0.1 is installed, and the user does not name it.
        """
        release = version or installed_version(self.name)
        is_over_batch = f"{release}.".startswith("0.1.")
        if is_over_batch and version is None:
            raise MoepruneError(
                f"layer `{name}` is from {self.name} {release}, whose dispatch softmax runs over the batch:"
                " the output for one input depends on the others",
                "install release 0.2.0 or newer, or, if the model was trained and is to run this way, give"
                f" `--source {self.name}==0.1.0`",
            )
        found = module.state_dict()
        d, n, p = found["phi"].shape
        weight = found["experts.weight"].mT.contiguous()  # (n,out,in)
        out = weight.shape[1]
        config = SoftMoEConfig(
            d, n, p, None, "none", "raw", "linear", None if out == d else out,
            dispatch_over="batch" if is_over_batch else "tokens",
        )  # fmt: skip
        bias = found.get("experts.bias", torch.zeros_like(weight[:, :, 0]))
        return config, {"phi": found["phi"], "fc2_weight": weight, "fc2_bias": bias}

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under the library's names; see `LayerLibrary.restore`."""
        restored = {"phi": tensors["phi"], "experts.weight": tensors["fc2_weight"].mT.contiguous()}
        if "experts.bias" in module.state_dict():
            restored["experts.bias"] = tensors["fc2_bias"]
        return restored
