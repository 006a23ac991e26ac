"""Refitted or narrowed experts, named, laid out and typed as in the folder that they go to."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.checkpoint import Copied, check_finite, write_unscanned
from moeprune.files.header import read_header
from moeprune.layers.gated_config import GatedMoEConfig
from moeprune.layers.layer import MoELayer
from moeprune.models.folders.layout import ModelFolder
from moeprune.models.folders.names import renumbered
from moeprune.models.folders.quantised import SCALE, requantised

LINEAR = re.compile(
    r"(.*\.)?((?P<both>gate_up_proj|input_linear)|(?P<gate>gate_proj|w1)|(?P<values>up_proj|w3|fc1)"
    r"|(?P<last>down_proj|w2|fc2|output_linear))(?P<is_bias>[._]bias)?(\.weight)?"
)
"""The key of a linear's weight or bias; `both`: gate and values in one."""
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text")
"""Types of models whose stacked experts have the inputs of a linear before its outputs."""


def expert_tensors(folder: ModelFolder, layers: Mapping[str, MoELayer]) -> Iterator[tuple[str, Tensor]]:
    """Yield what differs in pruned layers from the tensors of kept experts, by their names in the pruned folder and in
    its types: the last linears, and the first ones too where hidden units are dropped.

    Raises a MoepruneError if the full folder has other tensors than these.
    """
    return requantised(_changed(folder, layers), folder)


def spooled_tensors(folder: ModelFolder, layers: Mapping[str, MoELayer], spool: Path) -> dict[str, Copied]:
    """Return the same, written to files in a folder: one layer at a time is in memory.

    Raises a MoepruneError if values are not finite.
    """
    found: dict[str, Copied] = {}
    for index, (name, layer) in enumerate(layers.items()):
        tensors = dict(expert_tensors(folder, {name: layer.load()}))
        check_finite(tensors, folder.path)
        write_unscanned(spool / f"{index}.safetensors", tensors, None)
        header = read_header(spool / f"{index}.safetensors")
        found |= {each: Copied(header, each) for each in tensors}
    return found


def _changed(folder: ModelFolder, layers: Mapping[str, MoELayer]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the names of changed tensors in the full and in the pruned folder, and their values in full precision."""
    found, plans = set[tuple[str, str]](), {name: layer.plan for name, layer in layers.items()}
    is_transposed = str(folder.language.get("model_type", folder.config["model_type"])) in TRANSPOSED
    for header in folder.headers():
        for name, info in header.tensors.items():
            role = folder.role(name, info)
            if role is None or role.part == "router" or name.endswith(SCALE):
                continue
            if (layer := layers.get(role.layer)) is None:
                continue
            plan = plans[role.layer]
            if plan is None or not plan.kept:
                continue
            kept, width = plan.kept, plan.width
            match = LINEAR.fullmatch(role.key)
            if match is None and width is not None:
                raise _unknown(folder, name, width)
            if match is None or (width is None and not match["last"]) or role.expert not in (None, *kept):
                continue
            new = _tensor_of(layer, match)
            if new is None:
                raise _unknown(folder, name, width)
            old = info.shape if role.expert is not None else (len(kept), *info.shape[1:])
            renamed = name
            if role.expert is not None:
                place = kept.index(role.expert)
                new, renamed = new[place], renumbered(name, place)
            new = new.mT if is_transposed and new.ndim == 3 else new
            if not _fits(new.shape, old, layer.config.expert_width, width):
                raise _unknown(folder, name, width)
            found |= {(role.layer, part) for part in ("both", "gate", "values", "last") if match[part]}
            yield name, renamed, new.detach().cpu()
    for name, plan in plans.items():
        if plan is not None and plan.k and (name, "last") not in found:
            raise _unknown(folder, name, None)


def _tensor_of(layer: MoELayer, match: re.Match[str]) -> Tensor | None:
    """Return a weight (n,out,in) or bias (n,out) of all experts of a layer, None if it has none such."""
    kind = "bias" if match["is_bias"] else "weight"
    tensor: Tensor | None = getattr(layer, f"fc2_{kind}" if match["last"] else f"fc1_{kind}")
    if tensor is None or match["last"]:
        return tensor
    config = layer.config
    assert isinstance(config, GatedMoEConfig)
    tensor = tensor.mT if tensor.ndim == 3 else tensor
    if config.expert != "glu" or match["both"]:
        return tensor
    if config.alternates_gates:
        return tensor[:, 0::2] if match["gate"] else tensor[:, 1::2]
    first, second = tensor.chunk(2, 1)
    return first if bool(match["gate"]) == (config.gate_columns == "first") else second


def _fits(new: tuple[int, ...], old: tuple[int, ...], full: int, width: int | None) -> bool:
    """Return True for the old shape, with at most one axis of hidden units, or of gates and values, narrower."""
    if len(new) != len(old):
        return False
    narrower = [(n, o) for n, o in zip(new, old, strict=True) if n != o]
    return not narrower or (len(narrower) == 1 and narrower[0] in ((width, full), (2 * (width or 0), 2 * full)))


def _unknown(folder: ModelFolder, name: str, width: int | None) -> MoepruneError:
    message = f"`{folder.path}`: the linears of experts are laid out in an unknown way in `{name}`"
    hint = "give `--compensate renorm`, which changes no weights" if width is None else "leave `--width` out"
    return MoepruneError(message, hint)
