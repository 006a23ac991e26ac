"""Whether a library's own model computes what ours computes, on random images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.models.libraries.interface import Source, as_dense
from moeprune.models.model import Model, private_copy
from moeprune.models.results import MeasuredParity
from moeprune.models.vit import SoftMoEViT

IMAGES = 4
MAX_DIFFERENCE = 1e-5
"""Of two logits, as a share of the largest one: above it the models are not the same."""


@dataclass(frozen=True)
class Parity:
    """How far two models are apart, or why that was not measured.

    max_relative_difference: the largest difference of two logits over the largest logit.
    dtype: in which both computed.
    """

    max_relative_difference: float | None = None
    dtype: str | None = None
    skipped: str | None = None

    @property
    def measured(self) -> MeasuredParity | None:
        """For reports; None if it was skipped."""
        if self.max_relative_difference is None or self.dtype is None:
            return None
        return MeasuredParity(
            max_relative_difference=self.max_relative_difference, dtype=self.dtype, images=IMAGES
        )


def compare(model: SoftMoEViT, library: Source, tensors: Mapping[str, Tensor]) -> Parity:
    """Compare our model with the library's own one; see `difference`.

    Args:
        tensors: the library's state dict, which its class has to load strictly.

    Raises:
        MoepruneError: the library's class does not load them.
    """
    config, _ = as_dense(model.config, model.plan)
    try:
        theirs = library.build(config)
    except ImportError as error:
        return Parity(skipped=f"`{library.distribution}` cannot be imported ({error})")
    except Exception as error:  # whatever a library, or one that it needs, does where it does not fit
        return Parity(skipped=f"{library.model_class} cannot be built ({type(error).__name__}: {error})")
    try:
        theirs.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise MoepruneError(
            f"the installed `{library.distribution}` does not load these tensors ({error})",
            "install the version that wrote the file",
        ) from None
    return difference(model, theirs, model.input_format.shape)


def difference(ours: Model, theirs: nn.Module, shape: tuple[int, ...]) -> Parity:
    """How far two models are apart on random images of a shape (c,H,W), in float64 where memory allows.

    Args:
        theirs: is changed to that type.
    """
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    dtype = _affordable(parameters)
    if dtype is None:
        return Parity(skipped=f"a model of {parameters:,} parameters does not fit into memory once more")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64).to(dtype)
    with torch.inference_mode():
        logits = private_copy(ours).to(dtype)(images)  # one after the other, to hold one copy at a time
        expected = theirs.eval().to(dtype)(images)
    largest = float(expected.abs().max())
    if largest == 0:
        return Parity(skipped="all logits are zero: there is nothing to compare")
    return Parity(float((logits - expected).abs().max()) / largest, str(dtype).removeprefix("torch."))


def require_parity(parity: Parity, whose: str, path: str | Path) -> Parity:
    """Raise a MoepruneError if two models are not the same.

    Args:
        whose: the model that ours was compared with.
        path: of its checkpoint.
    """
    difference = parity.max_relative_difference
    if difference is not None and not difference <= MAX_DIFFERENCE:  # NaN too
        raise MoepruneError(
            f"`{path}`: logits of moeprune's model and of {whose} differ by {difference:.1e} of the largest"
            f" one in {parity.dtype}, more than {MAX_DIFFERENCE:g}; nothing is written",
            "another version of the library may have written the file; if not, please report this defect",
        )
    return parity


def _affordable(parameters: int) -> torch.dtype | None:
    """The widest type in which a copy of the weights fits into memory, beside the weights themselves, which
    may have to be read again."""
    memory = _available_memory()
    for dtype, size in ((torch.float64, 8), (torch.float32, 4)):
        if memory is None or parameters * (size + 4) < memory:
            return dtype
    return None


def _available_memory() -> int | None:
    """Bytes that can be had without swapping, where the system tells."""
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
