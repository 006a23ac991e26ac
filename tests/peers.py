"""The libraries whose checkpoints moeprune reads, made importable where torchvision has no operators.

A torchvision built for another torch, such as beside a CPU build, cannot be imported before somebody has
declared its operators. No test needs them to do anything.
"""

from __future__ import annotations

import importlib.util

import torch

OPERATORS = ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")


def _declare_operators() -> torch.library.Library | None:
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor a) -> Tensor")
            library.define(f"_{name}_backward(Tensor a) -> Tensor")
        return library
    return None


_declared = _declare_operators()  # for as long as the tests run


def has(module: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(module) is not None
