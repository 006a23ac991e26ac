"""The libraries whose checkpoints moeprune reads, made importable where torchvision has no operators.

A torchvision built for another torch, such as beside a CPU build, cannot be imported before somebody has
declared its operators. No test needs them to do anything.
"""

import importlib.util

import torch

OPERATORS = ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_declared = None

try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    _declared = torch.library.Library("torchvision", "DEF")  # for as long as the tests run
    for name in OPERATORS:
        _declared.define(f"{name}(Tensor a) -> Tensor")
        _declared.define(f"_{name}_backward(Tensor a) -> Tensor")


def has(module: str) -> bool:
    """Whether a library is installed."""
    return importlib.util.find_spec(module) is not None
