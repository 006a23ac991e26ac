"""A language model pruned in memory, written as a folder: the original tensors but for refitted last linears."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.layers.layer import MoELayer
from moeprune.models.folders.layout import read_folder
from moeprune.models.folders.names import Role, renumbered
from moeprune.models.language import LanguageModel
from moeprune.models.model import Model
from moeprune.models.results import ModelCost
from moeprune.plan import LayerPlan
from moeprune.pruning.folder import require_fitting, write_folder

LAST = re.compile(r"(.*\.)?(down_proj|w2|fc2|output_linear)(\.weight)?")
LAST_BIAS = re.compile(r"(.*\.)?(down_proj|w2|fc2)(_bias|\.bias)")


def write_pruned(full: LanguageModel, pruned: Model, output: Path, overwrite: bool) -> ModelCost:
    """Write the folder of a pruned model, and return its cost; full: the model that it was pruned from.

    Raises a MoepruneError if the plan is not one that a folder can hold, or the folder cannot be written.
    """
    plan, folder = pruned.plan, full.folder
    require_fitting(folder, plan)
    replaced = dict[str, Tensor]()
    if any(layer.compensation == "renorm-refit" and layer.drops for layer in plan.values()):
        replaced = dict(_refitted(full, pruned))
    write_folder(folder, plan, output, overwrite, pruned.details.provenance, replaced)
    return read_folder(output).cost()


def _refitted(full: LanguageModel, pruned: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield the refitted tensors by their names in the pruned folder, laid out and typed as in the full one."""
    dense, found = full.moe_layers, set[str]()
    for header in full.folder.headers():
        with safe_open(header.path, framework="pt") as file:
            for name, info in header.tensors.items():
                role = full.folder.role(name, info)
                if role is None or not (LAST.fullmatch(role.key) or LAST_BIAS.fullmatch(role.key)):
                    continue
                layer = pruned.moe_layers[role.layer]
                plan = layer.plan
                assert plan is not None
                if role.expert is None or role.expert in (plan.kept or ()):
                    new = _laid_out(role, file.get_tensor(name), dense[role.layer], layer, plan)
                    if new is None:
                        message = f"`{name}` is not what transformers makes the last linear of: it cannot be refitted"
                        raise MoepruneError(message, "give `--compensate renorm`")
                    place = None if role.expert is None else (plan.kept or ()).index(role.expert)
                    yield (name if place is None else renumbered(name, place)), new
                    found.add(role.layer)
    if lacking := sorted(set(dense) - found):
        raise MoepruneError(f"no last linears of experts in layer `{lacking[0]}`", "give `--compensate renorm`")


def _laid_out(role: Role, stored: Tensor, full: MoELayer, pruned: MoELayer, plan: LayerPlan) -> Tensor | None:
    """Return the refitted values of a stored tensor; None if it does not hold the values of the full layer's."""
    names = "fc2_bias" if LAST_BIAS.fullmatch(role.key) else "fc2_weight"
    before, after = (getattr(layer, names).detach().cpu() for layer in (full, pruned))
    assert plan.kept is not None
    first = plan.kept[0] if role.expert is None else role.expert
    one = (stored[first] if role.expert is None else stored).to(before.dtype)
    if role.expert is not None:
        after = after[plan.kept.index(role.expert)]
    is_transposed = one.shape != before[first].shape or not torch.equal(one, before[first])
    if is_transposed:
        if one.ndim != 2 or not (one.mT.shape == before[first].shape and torch.equal(one.mT, before[first])):
            return None
        after = after.mT
    return after.to(stored.dtype).contiguous()
