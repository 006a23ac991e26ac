"""Refitted last linears of experts, named, laid out and typed as in the folder that they go to."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.layers.layer import MoELayer
from moeprune.models.folders.layout import ModelFolder
from moeprune.models.folders.names import renumbered

LAST = re.compile(r"(.*\.)?(down_proj|w2|fc2|output_linear)(?P<is_bias>[._]bias)?(\.weight)?")
"""The key of a last linear's weight or bias."""
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
"""Types of models whose stacked experts have the inputs of a linear before its outputs."""


def refitted_tensors(folder: ModelFolder, layers: Mapping[str, MoELayer]) -> Iterator[tuple[str, Tensor]]:
    """Yield the last linears of pruned layers by their names in the pruned folder.

    Raises a MoepruneError if the full folder has other tensors than these.
    """
    found = set[str]()
    is_transposed = str(folder.language.get("model_type", folder.config["model_type"])) in TRANSPOSED
    for header in folder.headers():
        for name, info in header.tensors.items():
            role = folder.role(name, info)
            match = None if role is None or role.part == "router" else LAST.fullmatch(role.key)
            if role is None or match is None:
                continue
            layer = layers[role.layer]
            kept = () if layer.plan is None else layer.plan.kept or ()
            if role.expert is not None and role.expert not in kept:
                continue
            new: Tensor | None = getattr(layer, "fc2_bias" if match["is_bias"] else "fc2_weight")
            if new is None:
                raise _unknown(folder, name)
            shape: tuple[int, ...] = info.shape
            if role.expert is not None:
                new, name = new[kept.index(role.expert)], renumbered(name, kept.index(role.expert))
            else:
                new, shape = (new.mT if is_transposed and new.ndim == 3 else new), (len(kept), *shape[1:])
            if new.shape != shape:
                raise _unknown(folder, name)
            found.add(role.layer)
            yield name, new.detach().cpu().to(getattr(torch, info.dtype.removeprefix("torch."))).contiguous()
    if lacking := [name for name in layers if name not in found]:
        raise _unknown(folder, lacking[0])


def _unknown(folder: ModelFolder, name: str) -> MoepruneError:
    message = f"`{folder.path}`: the last linears of experts are laid out in an unknown way in `{name}`"
    return MoepruneError(message, "give `--compensate renorm`, which changes no weights")
