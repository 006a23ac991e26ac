"""What transformers builds of a folder: the module of a language model with the folder's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moeprune.data.tokenizer import EXTRA
from moeprune.errors import MoepruneError, listed, user_code
from moeprune.models.folders.layout import ModelFolder
from moeprune.models.folders.quantised import quantisation_of, stored_tensors

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
        if how is None:
            module, info = _first_that_fits(
                folder, "from_pretrained", str(folder.path), dtype="auto", use_safetensors=True,
                output_loading_info=True, **LOCAL,
            )  # fmt: skip
        else:
            skeleton = build_skeleton(folder)
            tensors = stored_tensors(folder, how)
            dtype = compute_dtype(skeleton.config.dtype)
            module, info = type(skeleton).from_pretrained(
                None, config=skeleton.config, state_dict=tensors, dtype=dtype, output_loading_info=True
            )
    if missing := sorted(info["missing_keys"]):
        raise MoepruneError(f"`{folder.path}` lacks tensors that transformers expects: {listed(missing, 3)}", HINT)
    if not torch.cuda.is_available() and any(tensor.dtype in HALF for tensor in module.parameters()):
        module.float()
    found: nn.Module = module
    return found


def build_skeleton(folder: ModelFolder) -> Any:
    """Return the module of a folder without its weights, on the meta device."""
    config = library().AutoConfig.from_pretrained(str(folder.path), **LOCAL)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        return _first_that_fits(folder, "from_config", config, trust_remote_code=False)


def compute_dtype(stated: torch.dtype | None) -> torch.dtype:
    """Return the type that weights are computed in, of one that a config states."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if stated is None else stated


def _first_that_fits(folder: ModelFolder, method: str, *arguments: Any, **options: Any) -> Any:
    """Return what a method of the class for text gives, or, where that knows no such model, of the one for images."""
    transformers = library()
    try:
        return getattr(transformers.AutoModelForCausalLM, method)(*arguments, **options)
    except ValueError:
        if "text_config" not in folder.config:
            raise
        return getattr(transformers.AutoModelForImageTextToText, method)(*arguments, **options)
