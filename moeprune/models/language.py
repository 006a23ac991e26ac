"""Folders of transformers opened as models: transformers builds all but the MoE layers, which are ours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.data.tokenizer import EXTRA
from moeprune.data.tokens import TokenFormat
from moeprune.errors import MoepruneError, listed, user_code
from moeprune.layers.interface import Usage
from moeprune.layers.layer import layer_of_tensors
from moeprune.models.description import Details
from moeprune.models.folders.experts import expert_tensors
from moeprune.models.folders.form import auto_class, form_of, is_drop_in, model_type_of
from moeprune.models.folders.layout import ModelFolder, read_folder
from moeprune.models.folders.names import natural
from moeprune.models.folders.remote import PrunedBlock, pruned_classes
from moeprune.models.folders.widths import keys_of_width
from moeprune.models.folders.writing import copy_folder, require_fitting, write_folder
from moeprune.models.language_config import LanguageConfig
from moeprune.models.libraries.transformers import RoutedBlock, describe_block, is_block, return_no_router_logits
from moeprune.models.model import Model
from moeprune.models.results import ModelCost
from moeprune.plan import LayerPlan, Plan

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HALF = (torch.float16, torch.bfloat16)


class LanguageModel(Model):
    """A language model whose MoE layers are ours: token ids (b,s) in, logits (b,s,V) out.

    folder: that it is from. module: as transformers builds it. places: of the layers in the model, by their names in
    the folder.
    """

    config: LanguageConfig

    def __init__(self, folder: ModelFolder, module: nn.Module, config: LanguageConfig, places: dict[str, str]):
        super().__init__(config, Details(source={"library": "transformers", "version": _transformers().__version__}))
        self.folder, self.places = folder, places
        self.module = module

    @property
    def input_format(self) -> TokenFormat:
        """Token ids, and the folder's tokenizer if it has one."""
        path = self.folder.path
        has_tokenizer = any((path / name).is_file() for name in TOKENIZERS)
        return TokenFormat(self.config.vocabulary, self.config.longest, path if has_tokenizer else None)

    def cost(self, usage: Mapping[str, Usage] | None = None) -> ModelCost:
        """Return size and cost; a model as its folder has it has the bytes of that, whatever its types are here."""
        return super().cost(usage) if self.plan != self.folder.plan else self.folder.cost()

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
        replaced, plan = dict[str, Tensor](), whole | self.plan
        changes = self.require_writable(plan)
        made = self.details.provenance
        if any(layer.changes_experts for layer in plan.values()):
            replaced = dict(expert_tensors(self.folder, self.moe_layers))
        write_folder(self.folder, plan, path, overwrite, made, replaced, changes, dict(self._compensation()))

    def _compensation(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what compensates for dropped experts, in the folder's names and the type of its experts."""
        for name, layer in self.moe_layers.items():
            if layer.plan is not None and not is_drop_in(layer.plan):
                dtype = getattr(torch, self.folder.layers[name].dtype.removeprefix("torch."))
                for key in layer.config.compensation_shapes(layer.plan):
                    tensor = layer.get_buffer(key).detach().cpu().to(dtype).contiguous()
                    yield f"{name}.compensation.{key}", tensor

    def require_writable(self, plan: Plan) -> dict[str, int]:
        """Return the keys of the folder's config that a plan's width changes, and their values.

        Raises a MoepruneError if a folder cannot hold the layers that the plan makes.
        """
        require_fitting(self.folder, plan)
        if form_of(plan) == "custom-code":
            pruned_classes(str(self.folder.config["model_type"]), auto_class(self.folder.config))
        if (width := next(iter(plan.values())).width) is None:
            return {}
        widths = {layer.expert_width for layer in self.config.layers.values()}
        if len(widths) > 1:
            raise MoepruneError(f"experts have {listed(sorted(map(str, widths)))} hidden units", "leave `--width` out")
        blocks = [place.removeprefix("module.").removesuffix(".routed") for place in self.places.values()]
        return keys_of_width(self.folder, widths.pop(), width, blocks, self._shapes)

    def _shapes(self, settings: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes of the tensors that transformers builds for a config, by its names of them."""
        transformers = _transformers()
        failed = f"transformers cannot build `{self.folder.path}` with experts of another width", "leave `--width` out"
        with _quiet(transformers), user_code(*failed), torch.device("meta"):
            config = transformers.AutoConfig.for_model(**settings)
            if not isinstance(config, type(self.module.config)):
                config = config.get_text_config()  # of a model that also takes images
            return {name: tensor.shape for name, tensor in type(self.module)(config).state_dict().items()}

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the model; an MoE layer by its name in the folder, too."""
        return super().get_submodule(self.places.get(target, target))

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all tensors, those of MoE layers under the names of these in the folder; tied ones once."""
        names = {f"{place}.": f"{name}." for name, place in self.places.items()}
        found, seen = dict[str, Any](), set[tuple[int, torch.Size]]()
        for name, tensor in super().state_dict(*arguments, **options).items():
            if (key := (tensor.data_ptr(), tensor.shape)) not in seen or not tensor.numel():
                layer = next((place for place in names if name.startswith(place)), "")
                found[names.get(layer, "") + name.removeprefix(layer)] = tensor
                seen.add(key)
        return found


def open_language(path: Path) -> LanguageModel:
    """Open a folder of transformers on the CPU; code in the folder is not run.

    Weights of 16 bits are converted to float32 unless there is a GPU.

    Raises a MoepruneError if transformers is missing or cannot build the model, tensors are missing, the weights are
    quantised, or a layer of experts is not known.
    """
    folder, transformers = read_folder(path), _transformers()
    if folder.config.get("quantization_config"):
        hint = "dequantise them first; `--signal random` and `--plan` with compensation `renorm` need no model"
        raise MoepruneError(f"the weights of `{path}` are quantised, which calibration cannot read", hint)
    how = {"output_loading_info": True, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    hint = "see whether transformers loads it (`from_pretrained`): another release of it may"
    with _quiet(transformers), user_code(f"transformers cannot build `{path}`", hint):
        if folder.plan:
            module, info = _pruned(folder, how)
        else:
            module, info = _full(transformers, folder, how)
    if missing := sorted(info["missing_keys"]):
        raise MoepruneError(f"`{path}` lacks tensors that transformers expects: {listed(missing, 3)}", hint)
    if not torch.cuda.is_available() and any(tensor.dtype in HALF for tensor in module.parameters()):
        module.float()
    return _with_our_layers(folder, module.requires_grad_(False).eval())


def _full(transformers: Any, folder: ModelFolder, how: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a folder, built by transformers alone, and what was missing."""
    path = str(folder.path)
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", **how)
    except ValueError:
        if "text_config" not in folder.config:
            raise
        return transformers.AutoModelForImageTextToText.from_pretrained(path, dtype="auto", **how)


def _pruned(folder: ModelFolder, how: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of a pruned folder with code, by the package's own code, and what was missing."""
    path, how = str(folder.path), {name: value for name, value in how.items() if name != "trust_remote_code"}
    classes: tuple[Any, Any] = pruned_classes(model_type_of(folder.config), auto_class(folder.config))
    config = classes[0].from_pretrained(path, local_files_only=True)
    return classes[1].from_pretrained(path, config=config, dtype="auto", **how)


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


@functools.cache
def _transformers() -> Any:
    """Return the library, or raise a MoepruneError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MoepruneError("a folder of a language model needs the package transformers", EXTRA) from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Let transformers show no progress and no warnings."""
    logs = transformers.utils.logging
    level, shows = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if shows:
            logs.enable_progress_bar()
