"""What transformers builds of a folder: the module of a language model with the folder's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from moeprune.data.tokenizer import EXTRA
from moeprune.errors import MoepruneError, listed, user_code
from moeprune.files.header import FLOATS
from moeprune.models.folders.form import auto_class, model_type_of
from moeprune.models.folders.layout import ModelFolder
from moeprune.models.folders.quantised import quantisation_of, stored_tensors
from moeprune.models.folders.remote import pruned_classes

HALF = (torch.float16, torch.bfloat16)
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
HINT = "see whether transformers loads it (`from_pretrained`): another release of it may"


@functools.cache
def library() -> Any:
    """Return transformers, or raise a MoepruneError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MoepruneError("a folder of a language model needs the package transformers", EXTRA) from None
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
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


def build_module(folder: ModelFolder) -> nn.Module:
    """Return the module of a folder on the CPU, with its weights; quantised ones are dequantised tensor by tensor.

    Weights of fewer than 32 bits are converted to float32 unless there is a GPU.

    Raises a MoepruneError if transformers cannot build it, tensors are missing, or weights are quantised in a way that
    cannot be read.
    """
    transformers, how = library(), quantisation_of(folder)
    with quiet(transformers), user_code(f"transformers cannot build `{folder.path}`", HINT):
        options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
        if folder.plan:  # by the package's own code
            classes: tuple[Any, Any] = pruned_classes(model_type_of(folder.config), auto_class(folder.config))
            config = classes[0].from_pretrained(str(folder.path), local_files_only=True)
            options |= {"config": config, "local_files_only": True}
            module, info = classes[1].from_pretrained(str(folder.path), **options)
        elif how is None:
            module, info = _first_that_fits(folder, "from_pretrained", str(folder.path), **options, **LOCAL)
        else:
            skeleton = build_skeleton(folder)
            options = {"state_dict": stored_tensors(folder, how), "dtype": skeleton.config.dtype}
            options |= {"config": skeleton.config, "output_loading_info": True}
            module, info = type(skeleton).from_pretrained(None, **options)
    if missing := sorted(info["missing_keys"]):
        raise MoepruneError(f"`{folder.path}` lacks tensors that transformers expects: {listed(missing, 3)}", HINT)
    if not torch.cuda.is_available() and any(tensor.dtype in HALF for tensor in module.parameters()):
        module.float()
    found: nn.Module = module
    return found


def build_skeleton(folder: ModelFolder, has_buffers: bool = False) -> Any:
    """Return the module of a folder without its weights: these are on the meta device.

    has_buffers: those tensors that no file holds are on the CPU, with their values.

    Raises a MoepruneError if transformers cannot build it.
    """
    transformers = library()
    with quiet(transformers), user_code(f"transformers cannot build `{folder.path}`", HINT):
        config = transformers.AutoConfig.from_pretrained(str(folder.path), **LOCAL)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with _parameters_on_meta() if has_buffers else torch.device("meta"):
            options = {"dtype": _compute_dtype(folder, config.dtype), "trust_remote_code": False}
            return _first_that_fits(folder, "from_config", config, **options)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters, and not buffers, on the meta device while modules are made."""

    def on_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if parameter.is_meta else nn.Parameter(parameter.detach().to("meta"), False)

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _compute_dtype(folder: ModelFolder, stated: torch.dtype | None) -> torch.dtype:
    """Return the type that weights are computed in, given the one that a config states, if it does."""
    if stated is None:
        types = (info.dtype for header in folder.headers() for info in header.tensors.values())
        stated = getattr(torch, next((name for name in types if name in FLOATS), FLOATS[0]).removeprefix("torch."))
    return torch.float32 if stated in HALF and not torch.cuda.is_available() else stated


def _first_that_fits(folder: ModelFolder, method: str, *arguments: Any, **options: Any) -> Any:
    """Return what a method of the class for text gives, or, where that knows no such model, of the one for images."""
    transformers = library()
    try:
        return getattr(transformers.AutoModelForCausalLM, method)(*arguments, **options)
    except ValueError:
        if "text_config" not in folder.config:
            raise
        return getattr(transformers.AutoModelForImageTextToText, method)(*arguments, **options)
