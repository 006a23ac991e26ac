"""Weights that stay on disk: a model whose parts read theirs when they run, and give them up when others need room.

A part is what lies between two MoE layers or one MoE layer. Copies of a model share what is in memory. Parameters of a
part that is not are on the meta device, so that shapes and types are known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeprune.files.disk import ScratchFolder
from moeprune.layers.layer import MoELayer
from moeprune.models.runtime import trim_memory

Kind = Literal["experts", "pruned", "rest"]
ROOM: dict[Kind, int] = {"experts": 1, "pruned": 1, "rest": 2}
"""Parts of each kind that are in memory at once, at most: a pass that waits in one layer goes on to the next."""
SOURCE = "weights_source"
"""The attribute of a module that has its Loader."""


class Part:
    """A part of a model; read: returns its tensors by name, on the CPU."""

    def __init__(self, store: Store, kind: Kind, read: Callable[[], Mapping[str, Tensor]]):
        self.store, self.kind, self.read = store, kind, read
        self.tensors: dict[str, Tensor] | None = None
        self.users: list[weakref.ref[nn.Module]] = []

    def give(self, module: nn.Module, path: str) -> None:
        """Give a module of this part its own tensors, if it has not got them; path: of the module in the part."""
        lacking = [name for name, tensor in own_tensors(module).items() if tensor.is_meta]
        if not lacking:
            return
        if self.tensors is None:
            self.store.make_room(self)
            with torch.inference_mode(False), torch.no_grad():
                self.tensors = {name: tensor.to(self.store.device) for name, tensor in self.read().items()}
            trim_memory()  # what reading took, in several threads
        for name in lacking:
            _set(module, name, self.tensors[f"{path}.{name}" if path else name])
        self.users.append(weakref.ref(module))

    def drop(self) -> None:
        """Take the tensors from all modules that have them."""
        for user in self.users:
            if (module := user()) is not None:
                take_weights(module)
        self.users, self.tensors = [], None


class Loader:
    """Gives a module the weights that it lacks, before it runs.

    path: of the module in the part. What is within the module and belongs to the same part gets its weights too: a
    module may use them without running it.
    """

    def __init__(self, part: Part, path: str):
        self.part, self.path = part, path

    def __call__(self, module: nn.Module, _: Any = None) -> None:
        """Give a module its weights."""
        for each in module.modules():
            loader = vars(each).get(SOURCE)
            if loader is not None and loader.part is self.part:
                self.part.give(each, loader.path)

    def __deepcopy__(self, _: Any) -> Loader:
        return self  # copies of a model share what is in memory

    def attach(self, module: nn.Module) -> None:
        """Let a module get its weights from here."""
        take_weights(module)
        vars(module)[SOURCE] = self
        if not isinstance(module, MoELayer):  # which asks when it runs: a walk may know what it gives
            module.register_forward_pre_hook(self)


class Store:
    """The parts of a model that are in memory, on one device, and a folder for those that pruning makes."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.held: dict[Kind, list[Part]] = {kind: [] for kind in ROOM}
        self.folder = ScratchFolder()
        self.shelved = 0

    def __deepcopy__(self, _: Any) -> Store:
        return self

    def make_room(self, part: Part) -> None:
        """Note that a part comes into memory, and drop the one of its kind that came first if there are too many."""
        held = self.held[part.kind]
        while len(held) >= ROOM[part.kind]:
            held.pop(0).drop()
            trim_memory()
        held.append(part)

    def drop_all(self) -> None:
        """Drop all parts that are in memory."""
        for held in self.held.values():
            while held:
                held.pop().drop()

    def move(self, device: torch.device) -> None:
        """Read weights to another device from now on."""
        if device != self.device:
            self.drop_all()
            self.device = device

    def shelve(self, layer: MoELayer) -> None:
        """Write the tensors of a pruned layer to a file, from which it reads them when it runs."""
        if SOURCE in vars(layer):
            return
        tensors = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
        turned = {name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.mT.is_contiguous()}
        path = Path(self.folder.name) / f"{self.shelved}.safetensors"
        self.shelved += 1
        save_file({name: (t.mT if name in turned else t.contiguous()).cpu() for name, t in tensors.items()}, path)

        def read() -> dict[str, Tensor]:
            return {name: t.mT if name in turned else t for name, t in load_file(path).items()}

        Loader(Part(self, "pruned", read), "").attach(layer)


def take_weights(module: nn.Module) -> None:
    """Put a module's own tensors on the meta device."""
    for name, tensor in own_tensors(module).items():
        if not tensor.is_meta:
            _set(module, name, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module that files hold, without those of its parts."""
    buffers = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **buffers}.items() if tensor is not None}


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        module._parameters[name] = nn.Parameter(tensor, False)
