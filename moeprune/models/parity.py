"""Our model beside the one that it stands for: both on the same random images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError, user_code
from moeprune.models.architecture import ViTConfig
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.model import Model
from moeprune.models.results import Parity
from moeprune.models.runtime import input_dtype

IMAGES = 4
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Difference of logits of equal models, relative to the largest one, by the narrowest type."""


def compare(model: Model, library: SoftMoEViTs, config: ViTConfig, tensors: Mapping[str, Tensor]) -> Parity:
    """Compare our model with the library's own of a dense config, which must load its tensors strictly."""
    try:
        theirs = library.build(config)
    except ImportError as error:
        return skipped(f"`{library.name}` cannot be imported ({error})")
    except Exception as error:  # anything can happen in a library, or in those that it needs
        return skipped(f"{library.model_class} cannot be built ({type(error).__name__}: {error})")
    try:
        theirs.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise MoepruneError(
            f"the installed `{library.name}` does not load these tensors ({error})",
            "install the version that wrote the file",
        ) from None
    return difference(model, theirs, library.model_class)


def to_library(model: Model, config: ViTConfig, library: SoftMoEViTs) -> dict[str, Tensor]:
    """Return the state dict of a library's own model that computes the same as ours; config: see `as_dense`."""
    ours, theirs = model.state_dict(), {}
    entries = library.entries(config)
    assert set(ours) == {entry.ours for entry in entries}
    for entry in entries:
        tensor = ours[entry.ours].mT if entry.transposed else ours[entry.ours]
        for name, part in zip(entry.theirs, tensor.unbind() if entry.split else [tensor], strict=True):
            theirs[name] = part.reshape(entry.shape).clone(memory_format=torch.contiguous_format)
    return theirs


def difference(ours: Model, theirs: nn.Module, name: str) -> Parity:
    """Compare two models on random images, in float64 if memory and the code allow it, else in their own precision.

    Raises:
        MoepruneError: they do not compute the same.
    """
    parameters, memory = sum(parameter.numel() for parameter in theirs.parameters()), _available_memory()
    for wide in (torch.float64, torch.float32):  # a copy of the weights must fit beside the weights
        if memory is None or parameters * (wide.itemsize + 4) < memory:
            break
    else:
        return skipped(f"a model of {parameters:,} parameters does not fit into memory once more")
    shape, models = (IMAGES, *ours.config.input_shape), {ours: "moeprune's model", theirs: name}
    try:
        logits, expected = (_logits(model, shape, wide, text) for model, text in models.items())
        narrowest, tolerance = wide, TOLERANCE[torch.float64]
    except MoepruneError:  # the code may convert to a precision of its choice
        logits, expected = (_logits(model, shape, None, text) for model, text in models.items())
        types = {parameter.dtype for parameter in theirs.parameters() if parameter.is_floating_point()}
        narrowest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        tolerance = TOLERANCE.get(narrowest, 0.1)
    largest = float(expected.abs().max())
    if largest == 0:
        return skipped("all logits are zero: there is nothing to compare")
    found, type_name = float((logits - expected).abs().max()) / largest, str(narrowest).removeprefix("torch.")
    if not found <= tolerance:  # NaN too
        raise MoepruneError(
            f"logits of moeprune's model and of {name} differ by {found:.1e} of the largest one ({type_name})"
            f", more than {tolerance:g}",
            "another version of the library may have written the file; if not, please report this defect",
        )
    return Parity(max_relative_difference=found, dtype=type_name, images=IMAGES, skipped=None)


def skipped(reason: str) -> Parity:
    """Return the parity of models that are not compared."""
    return Parity(max_relative_difference=None, dtype=None, images=None, skipped=reason)


def _logits(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None, name: str) -> Tensor:
    """Return the logits of a model for random images; dtype: None leaves the types as they are."""
    model.eval()
    with _in_precision(model, dtype), torch.inference_mode():
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with user_code(f"{name} fails on an input of shape {list(shape)}"):
            return model(images.to(input_dtype(model))).double()


@contextlib.contextmanager
def _in_precision(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Convert a model in place, and put the very tensors that it had back in the end."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(part, key, value) for part in model.modules() for key, value in part._buffers.items()]
    try:
        for parameter, data in parameters:
            parameter.data = _converted(data, dtype)
        for part, key, value in buffers:
            part._buffers[key] = None if value is None else _converted(value, dtype)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for part, key, value in buffers:
            part._buffers[key] = value


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(dtype.to_complex() if tensor.is_complex() else dtype)


def _available_memory() -> int | None:
    """Return the bytes available without swapping; None if unknown."""
    known = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
            known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    with contextlib.suppress(OSError, ValueError):  # no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(known, default=None)
