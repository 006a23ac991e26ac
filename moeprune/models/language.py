"""Folders of transformers opened as models: transformers builds all but the MoE layers, which are ours."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError, listed, user_code
from moeprune.files.checkpoint import Copied
from moeprune.files.disk import read_json
from moeprune.layers.interface import Usage
from moeprune.layers.layer import MoELayer, layer_of_tensors
from moeprune.models.building import build_module, library, quiet
from moeprune.models.description import Details
from moeprune.models.folders.experts import expert_tensors, spooled_tensors
from moeprune.models.folders.layout import PLAN, ModelFolder, read_folder
from moeprune.models.folders.names import natural
from moeprune.models.folders.quantised import changes_weights, require_form
from moeprune.models.folders.widths import keys_of_width
from moeprune.models.folders.writing import require_fitting, write_folder
from moeprune.models.language_config import LanguageConfig
from moeprune.models.libraries.transformers import RoutedBlock, describe_block, is_block, layers_around
from moeprune.models.model import Model
from moeprune.models.offload import SOURCE, Loader, Part, Store, own_tensors
from moeprune.models.reading import build_offloaded
from moeprune.models.results import ModelCost
from moeprune.plan import LayerPlan, Plan

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
        """Return size and cost; a model that is not pruned has the bytes of its folder, whatever its types are here."""
        return super().cost(usage) if self.plan else self.folder.cost()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (b,s) in, logits (b,s,V) out."""
        return self.module(input_ids=ids, use_cache=False).logits

    def write(self, path: Path, overwrite: bool) -> None:
        """Write the folder of the model, which may be pruned to fewer experts: other tensors are those of its folder.

        Raises a MoepruneError if the plan is not one that a folder can hold, or the folder cannot be written.
        """
        n = self.folder.num_experts
        whole = dict.fromkeys(self.folder.layers, LayerPlan("static", n, n, "random", "renorm", tuple(range(n))))
        replaced, plan = dict[str, Tensor | Copied](), whole | self.plan
        changes = self.require_writable(plan)
        with tempfile.TemporaryDirectory(prefix="moeprune-") as spool:
            if changes_weights(plan) and self.store is not None:
                replaced |= spooled_tensors(self.folder, self.moe_layers, Path(spool))
            elif changes_weights(plan):
                replaced |= expert_tensors(self.folder, self.moe_layers)
            write_folder(self.folder, plan, path, overwrite, self.details.provenance, replaced, changes)

    def require_writable(self, plan: Plan) -> dict[str, int]:
        """Return the keys of the folder's config that a plan's width changes, and their values.

        Raises a MoepruneError if a folder cannot hold the layers that the plan makes.
        """
        require_fitting(self.folder, plan)
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
    if not offload:
        return _with_our_layers(folder, build_module(folder).requires_grad_(False).eval())
    module, reader, store = build_offloaded(folder)
    model = _with_our_layers(folder, module.requires_grad_(False).eval())
    for layer, block in zip(model.moe_layers.values(), reader.blocks, strict=True):
        Loader(Part(store, "experts", functools.partial(reader.read, block)), "").attach(layer)
    model.store = store
    return model


def _with_our_layers(folder: ModelFolder, module: nn.Module) -> LanguageModel:
    """Return the model with our layers in place of router and experts of each block, of the same memory."""
    blocks = sorted((name for name, part in module.named_modules() if is_block(part)), key=natural)
    if len(blocks) != len(folder.layers):
        found = f"{len(blocks)} blocks of experts that moeprune knows, the folder {len(folder.layers)} layers"
        raise MoepruneError(f"`{folder.path}`: transformers builds {found}", "prune it without `--data`")
    layers, places = {}, {}
    for name, path in zip(folder.layers, blocks, strict=True):
        block = module.get_submodule(path)
        layers[name], tensors = describe_block(block, path)
        module.set_submodule(path, RoutedBlock(block, layer_of_tensors(layers[name], None, tensors)), strict=True)
        places[name] = f"module.{path}.routed"
    cost = folder.cost().flops_per_input
    config = LanguageConfig(str(folder.language.get("model_type", folder.config["model_type"])), folder.vocabulary,
                            folder.longest, layers, int(cost.other))  # fmt: skip
    model = LanguageModel(folder, module, config, places).requires_grad_(False).eval()
    if (folder.path / PLAN).is_file():
        recorded = read_json(folder.path / PLAN, "the plan of a pruned folder").get("provenance", {})
        model.details = model.details.replace(provenance=recorded)
    return model
