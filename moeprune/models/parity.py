"""Comparison of our model with the library's own, or the user's, on random images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.models.architecture import ViTConfig
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.model import Model, private_copy
from moeprune.models.results import Parity

IMAGES = 4
MAX_DIFFERENCE = 1e-5  # of logits of equal models, relative to the largest one


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


def difference(ours: Model, theirs: nn.Module, name: str) -> Parity:
    """Compare two models on random images, in float64 if memory allows; `theirs` is converted to that type.

    Raises:
        MoepruneError: they do not compute the same.
    """
    parameters, memory = sum(parameter.numel() for parameter in theirs.parameters()), _available_memory()
    for dtype in (torch.float64, torch.float32):  # a copy of the weights must fit beside the weights
        if memory is None or parameters * (dtype.itemsize + 4) < memory:
            break
    else:
        return skipped(f"a model of {parameters:,} parameters does not fit into memory once more")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *ours.config.input_shape, generator=generator, dtype=torch.float64).to(dtype)
    with torch.inference_mode():
        logits = private_copy(ours).to(dtype)(images)  # one after the other, to hold one copy at a time
        expected = theirs.eval().to(dtype)(images)
    largest = float(expected.abs().max())
    if largest == 0:
        return skipped("all logits are zero: there is nothing to compare")
    found, type_name = float((logits - expected).abs().max()) / largest, str(dtype).removeprefix("torch.")
    if not found <= MAX_DIFFERENCE:  # NaN too
        raise MoepruneError(
            f"logits of moeprune's model and of {name} differ by {found:.1e} of the largest one ({type_name})"
            f", more than {MAX_DIFFERENCE:g}",
            "another version of the library may have written the file; if not, please report this defect",
        )
    return Parity(max_relative_difference=found, dtype=type_name, images=IMAGES, skipped=None)


def skipped(reason: str) -> Parity:
    """Return the parity of models that are not compared."""
    return Parity(max_relative_difference=None, dtype=None, images=None, skipped=reason)


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
