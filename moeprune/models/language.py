"""Folders of transformers opened as models: transformers builds all but the MoE layers, which are ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import asdict, replace
from torch import Tensor, nn

from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError, listed, user_code
from moeprune.files.checkpoint import Copied, tensor_infos
from moeprune.files.disk import ScratchFolder
from moeprune.files.header import TensorInfo
from moeprune.layers.interface import Usage
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.models.building import build_module, library, quiet
from moeprune.models.description import Details
from moeprune.models.folders.costs import PrunedBytes
from moeprune.models.folders.experts import expert_tensors, spooled_tensors
from moeprune.models.folders.form import auto_class, form_of, is_drop_in
from moeprune.models.folders.layout import ModelFolder, read_folder
from moeprune.models.folders.names import natural
from moeprune.models.folders.quantised import changes_weights, require_form
from moeprune.models.folders.remote import PrunedBlock, pruned_classes
from moeprune.models.folders.widths import keys_of_width
from moeprune.models.folders.writing import copy_folder, require_fitting, write_folder
from moeprune.models.language_config import LanguageConfig
from moeprune.models.libraries.transformers import (
    RoutedBlock,
    describe_block,
    is_block,
    layers_around,
    return_no_router_logits,
)
from moeprune.models.model import Model
from moeprune.models.offload import SOURCE, Loader, Part, Store, own_tensors
from moeprune.models.reading import build_offloaded
from moeprune.models.results import ModelCost
from moeprune.plan import LayerPlan, Plan

logger = logging.getLogger(__name__)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class LanguageModel(Model):
    """A language model whose MoE layers are ours: token ids (b,s) in, logits (b,s,V) out.

    folder: that it is from. module: as transformers builds it. places: of the layers in the model, by their names in
    the folder.
    """

    config: LanguageConfig

    def __init__(self, folder: ModelFolder, module: nn.Module, config: LanguageConfig, places: dict[str, str]):
        super().__init__(config, Details(source={"library": "transformers", "version": library().__version__}))
        self.folder, self.places = folder, places
        self.module = module
        self.store: Store | None = None  # of weights that are not all in memory

    @property
    def input_format(self) -> TokenFormat:
        """Token ids, and the folder's tokenizer if it has one."""
        path = self.folder.path
        has_tokenizer = any((path / name).is_file() for name in TOKENIZERS)
        return TokenFormat(self.config.vocabulary, self.config.longest, path if has_tokenizer else None)

    def cost(self, usage: Mapping[str, Usage] | None = None) -> ModelCost:
        """Return size and cost, in the types of the folder, whatever they are in memory."""
        if self.plan == self.folder.plan:
            return self.folder.cost()
        found = self.config.cost(self.plan, dict(map(self._as_stored, tensor_infos(self.state_dict()).items())), usage)
        other = self.folder.cost().bytes_by_part.other - PrunedBytes(self.folder, self.config.layers).left_out
        parts = replace(found.bytes_by_part, other=other)
        return replace(found, bytes=sum(asdict(parts).values()), bytes_by_part=parts)

    def _as_stored(self, entry: tuple[str, TensorInfo]) -> tuple[str, TensorInfo]:
        """Return the name of a tensor, and what it is in a folder: compensation has the type of the experts."""
        name, info = entry
        layer, _, key = name.rpartition(".")
        if layer not in self.folder.layers:
            return entry
        known = self.folder.layers[layer]
        of_router = [each.dtype for role, each in known.whole.values() if role.part == "router"]
        dtype = of_router[0] if self.config.layers[layer].part(key) == "routing" and of_router else known.dtype
        size = getattr(torch, dtype.removeprefix("torch.")).itemsize
        return name, TensorInfo(dtype, info.shape, info.numel * size)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b,s) in, logits (b,s,V) out."""
        return self.module(input_ids=ids, use_cache=False).logits

    def write(self, path: Path, overwrite: bool) -> None:
        """Write the folder of the model, which may be pruned: other tensors are those of its folder.

        Raises a MoepruneError if the plan is not one that a folder can hold, or the folder cannot be written.
        """
        if self.folder.plan:
            return copy_folder(self.folder, path, overwrite)
        n = self.folder.num_experts
        whole = dict.fromkeys(self.folder.layers, LayerPlan("static", n, n, "random", "renorm", tuple(range(n))))
        replaced, plan = dict[str, Tensor | Copied](), whole | self.plan
        changes = self.require_writable(plan)
        made = self.details.provenance
        with ScratchFolder() as spool:
            if changes_weights(plan) and self.store is not None:
                replaced |= spooled_tensors(self.folder, self.moe_layers, Path(spool))
            elif changes_weights(plan):
                replaced |= expert_tensors(self.folder, self.moe_layers)
            write_folder(self.folder, plan, path, overwrite, made, replaced, changes, dict(self._compensation()))

    def _compensation(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what compensates for dropped experts, in the folder's names and the type of its experts."""
        for name, layer in self.moe_layers.items():
            if layer.plan is not None and not is_drop_in(layer.plan):
                dtype = getattr(torch, self.folder.layers[name].dtype.removeprefix("torch."))
                for key in layer.config.compensation_shapes(layer.plan):
                    tensor = layer.load().get_buffer(key).detach().cpu().to(dtype).contiguous()
                    yield f"{name}.compensation.{key}", tensor

    def require_writable(self, plan: Plan) -> dict[str, int]:
        """Return the keys of the folder's config that a plan's width changes, and their values.

        Raises a MoepruneError if a folder cannot hold the layers that the plan makes.
        """
        require_fitting(self.folder, plan)
        if form_of(plan) == "custom-code":
            pruned_classes(str(self.folder.config["model_type"]), auto_class(self.folder.config))
        require_form(self.folder, plan)
        if (width := next(iter(plan.values())).width) is None:
            return {}
        widths = {layer.expert_width for layer in self.config.layers.values()}
        if len(widths) > 1:
            raise MoepruneError(f"experts have {listed(sorted(map(str, widths)))} hidden units", "leave `--width` out")
        blocks = [place.removeprefix("module.").removesuffix(".routed") for place in self.places.values()]
        return keys_of_width(self.folder, widths.pop(), width, blocks, self._shapes)

    def _shapes(self, settings: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes of the tensors that transformers builds for a config, by its names of them."""
        transformers = library()
        failed = f"transformers cannot build `{self.folder.path}` with experts of another width", "leave `--width` out"
        with quiet(transformers), user_code(*failed), torch.device("meta"):
            config = transformers.AutoConfig.for_model(**settings)
            if not isinstance(config, type(self.module.config)):
                config = config.get_text_config()  # of a model that also takes images
            return {name: tensor.shape for name, tensor in type(self.module)(config).state_dict().items()}

    @property
    def reads_weights(self) -> bool:
        """True with `--offload`."""
        return self.store is not None

    @property
    def sequence(self) -> list[str]:
        """The layers of the decoder, MoE layers in them or not."""
        return layers_around(self, list(self.places.values()))

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the model; an MoE layer by its name in the folder, too."""
        return super().get_submodule(self.places.get(target, target))

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """Replace a part under all of its names; the weights of a pruned layer go to disk where others are there."""
        super().set_submodule(target, module, strict)
        if self.store is not None and isinstance(module, MoELayer):
            self.store.shelve(module)

    def release_weights(self) -> None:
        """Drop the weights that are read again when they are needed."""
        if self.store is not None:
            self.store.drop_all()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """Move what is in memory, and read the rest to where that is from now on.

        Raises a MoepruneError for another type, which what is on disk does not get.
        """
        if self.store is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.store.drop_all()
        if any(
            fn(tensor[:0]).dtype != tensor.dtype for tensor in self.parameters() if tensor.ndim and not tensor.is_meta
        ):
            raise MoepruneError("weights that stay on disk have one type", "load the model without `--offload`")
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        self.store.move(next(tensor.device for tensor in self.parameters() if not tensor.is_meta))
        return self

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors by name, those on disk one after the other."""
        for name, tensor in self.state_dict().items():
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            if tensor.is_meta:
                vars(owner)[SOURCE](owner)
            yield name, own_tensors(owner)[leaf].detach()

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all tensors, those of MoE layers under the names of these in the folder; tied ones once."""
        names = {f"{place}.": f"{name}." for name, place in self.places.items()}
        found, seen = dict[str, Any](), set[tuple[int, torch.Size]]()
        for name, tensor in super().state_dict(*arguments, **options).items():
            if (key := (tensor.data_ptr(), tensor.shape)) not in seen or not tensor.numel() or tensor.is_meta:
                layer = next((place for place in names if name.startswith(place)), "")
                found[names.get(layer, "") + name.removeprefix(layer)] = tensor
                seen.add(key)
        return found


def open_language(path: Path, offload: bool = False) -> LanguageModel:
    """Open a folder of transformers on the CPU; code in the folder is not run.

    Weights of fewer than 32 bits are converted to float32 unless there is a GPU.

    offload: layers read their weights when they run, and keep them only until the next ones do.

    Raises a MoepruneError if transformers is missing or cannot build the model, tensors are missing, the weights are
    quantised in a way that cannot be read, or a layer of experts is not known.
    """
    folder = read_folder(path)
    if offload and folder.plan:
        logger.warning(f"`{path}` has modelling code: all of its weights are read into memory")
    if not offload or folder.plan:
        return _with_our_layers(folder, build_module(folder).requires_grad_(False).eval())
    module, reader, store = build_offloaded(folder)
    model = _with_our_layers(folder, module.requires_grad_(False).eval())
    for layer, block in zip(model.moe_layers.values(), reader.blocks, strict=True):
        Loader(Part(store, "experts", functools.partial(reader.read, block)), "").attach(layer)
    model.store = store
    return model


def _with_our_layers(folder: ModelFolder, module: nn.Module) -> LanguageModel:
    """Return the model with our layers in place of router and experts of each block, of the same memory."""
    found = (name for name, part in module.named_modules() if is_block(part) or isinstance(part, PrunedBlock))
    blocks = sorted(found, key=natural)
    if len(blocks) != len(folder.layers):
        builds = f"builds {len(blocks)} blocks of experts that moeprune knows, the folder {len(folder.layers)} layers"
        raise MoepruneError(f"`{folder.path}`: transformers {builds}", "prune it without `--data`")
    return_no_router_logits(module.config)
    layers, places = {}, {}
    for name, path in zip(folder.layers, blocks, strict=True):
        block = module.get_submodule(path)
        if isinstance(block, PrunedBlock):
            layers[name], routed = block.config, block.routed
        else:
            layers[name], tensors = describe_block(block, path)
            routed = RoutedBlock(block, layer_of_tensors(layers[name], None, tensors))
        module.set_submodule(path, routed, strict=True)
        places[name] = f"module.{path}.routed"
    cost = folder.cost().flops_per_input
    config = LanguageConfig(folder.model_type, folder.vocabulary, folder.longest, layers, int(cost.other))
    model = LanguageModel(folder, module, config, places).requires_grad_(False).eval()
    model.details = model.details.replace(provenance=folder.provenance)
    return model
