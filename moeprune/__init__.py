"""Inference-time expert pruning of Soft Mixture-of-Experts models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprune.adopted import adopt
    from moeprune.calibration import analyze, load_analysis, save_analysis
    from moeprune.data import open_data
    from moeprune.errors import MoepruneError
    from moeprune.evaluation import evaluate
    from moeprune.model import load, save
    from moeprune.pruning import prune
    from moeprune.runtime import Runtime

__version__ = "0.1.0"

__all__ = [
    "MoepruneError",
    "Runtime",
    "adopt",
    "analyze",
    "evaluate",
    "load",
    "load_analysis",
    "open_data",
    "prune",
    "save",
    "save_analysis",
]

_HOMES = {
    "MoepruneError": "errors",
    "Runtime": "runtime",
    "adopt": "adopted",
    "analyze": "calibration",
    "evaluate": "evaluation",
    "load": "model",
    "load_analysis": "calibration",
    "open_data": "data",
    "prune": "pruning",
    "save": "model",
    "save_analysis": "calibration",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `moeprune --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moeprune' has no attribute {name!r}")
    return getattr(import_module(f"moeprune.{_HOMES[name]}"), name)
