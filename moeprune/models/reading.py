"""Weights of a folder read part by part, into what transformers builds without weights (tested with 5.24).

transformers renames the tensors of a folder, and stacks those of experts; its functions for that run on
the tensors of one part at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, listed, user_code
from moeprune.models.building import HINT, build_skeleton, library, quiet
from moeprune.models.folders.layout import ModelFolder
from moeprune.models.folders.names import natural
from moeprune.models.folders.quantised import quantisation_of, stored_tensors
from moeprune.models.libraries.transformers import SHARED, describe_block, is_block, layers_around
from moeprune.models.offload import Loader, Part, Store, own_tensors, take_weights

SHARED_PARTS = (*SHARED, "shared_expert_gate")


class Reader:
    """Reads the weights of a folder part by part.

    skeleton: the module, without weights. blocks: the names of MoE blocks in it, in order. layers: of decoder layers,
    with MoE blocks or without. names: those of tensors in the folder, by part: that of a block, of a layer, or "".
    """

    def __init__(self, folder: ModelFolder):
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.folder, self.stored = folder, stored_tensors(folder, quantisation_of(folder))
        self.skeleton = build_skeleton(folder)
        self.dtype: torch.dtype = self.skeleton.config.dtype
        self.conversions: Any = get_model_conversion_mapping(self.skeleton)
        found = (name for name, module in self.skeleton.named_modules() if is_block(module))
        self.blocks = sorted(found, key=natural)
        self.layers = layers_around(self.skeleton, self.blocks)
        if not self.layers:
            message = f"`{folder.path}`: its MoE layers are in no list of layers, which `--offload` needs"
            raise MoepruneError(message, "leave it out")
        self.names = self._by_part()

    def _by_part(self) -> dict[str, list[str]]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [each for each in self.conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in self.conversions if isinstance(each, WeightConverter)]
        prefix, expected = self.skeleton.base_model_prefix, self.skeleton.state_dict()
        found: dict[str, list[str]] = {part: [] for part in ("", *self.layers, *self.blocks)}
        for name in self.stored:
            renamed, _ = rename_source_key(name, renamings, converters, prefix, expected)
            found[self.part_of(renamed)].append(name)
        return found

    def part_of(self, name: str) -> str:
        """Return the part that a tensor of the module is in."""
        layer = next((each for each in self.layers if name.startswith(f"{each}.")), "")
        block = next((each for each in self.blocks if name.startswith(f"{each}.")), None)
        if block is None or name.removeprefix(f"{block}.").split(".")[0] in SHARED_PARTS:
            return layer
        return block

    def load_into(self, module: Any, part: str) -> set[str]:
        """Give a module the weights of a part; return the names of those that it still lacks, of any part.

        Raises a MoepruneError if weights are of other shapes.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        plan = module._get_dtype_plan(self.dtype)
        how = LoadStateDictConfig(dtype=self.dtype, dtype_plan=plan, weight_mapping=self.conversions)
        tensors = {name: self.stored[name] for name in self.names[part]}
        with quiet(library()), user_code(f"transformers cannot read the weights of `{self.folder.path}`", HINT):
            info, _ = convert_and_load_state_dict_in_model(module, tensors, how)
        if wrong := sorted({*info.conversion_errors, *(name for name, *_ in info.mismatched_keys)}):
            raise MoepruneError(f"`{self.folder.path}`: tensors do not fit the config: {listed(wrong, 3)}", HINT)
        missing: set[str] = info.missing_keys
        return missing

    def read(self, part: str) -> dict[str, Tensor]:
        """Return the weights of a layer by their names in it, or of a block as those of our layer.

        Raises a MoepruneError if some are missing.
        """
        self.load_into(self.skeleton, part)
        own = self.skeleton.get_submodule(part)
        names = [name for name in own.state_dict() if self.part_of(f"{part}.{name}") == part]
        try:
            if missing := [f"{part}.{name}" for name in names if _tensor(own, name).is_meta]:
                message = f"`{self.folder.path}` lacks tensors that transformers expects: {listed(missing, 3)}"
                raise MoepruneError(message, HINT)
            if part in self.blocks:
                return describe_block(own, part)[1]
            return {name: _tensor(own, name).detach() for name in names}
        finally:
            for module in own.modules():
                take_weights(module)


def build_offloaded(folder: ModelFolder) -> tuple[nn.Module, Reader, Store]:
    """Return the module of a folder whose layers read their weights when they run, what reads them, and where they are.

    Those of blocks stay on the meta device. What is in no layer, such as embeddings, is in memory.

    Raises a MoepruneError if transformers cannot build it, or tensors are missing outside of layers.
    """
    reader, store = Reader(folder), Store()
    module = build_skeleton(folder, has_buffers=True)
    lacking = reader.load_into(module, "")
    with quiet(library()):
        module.tie_weights(missing_keys=lacking)
    state = {name: tensor for name, tensor in module.state_dict().items() if not reader.part_of(name)}
    if missing := sorted(name for name, tensor in state.items() if tensor.is_meta):
        raise MoepruneError(f"`{folder.path}` lacks tensors that transformers expects: {listed(missing, 3)}", HINT)
    for layer in reader.layers:
        part = Part(store, "rest", functools.partial(reader.read, layer))
        for name, each in module.get_submodule(layer).named_modules():
            if name or own_tensors(each):  # a layer that has none of its own may be passed over
                Loader(part, name).attach(each)
    return module, reader, store


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor
