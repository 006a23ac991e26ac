"""Inference-time expert pruning of Soft Mixture-of-Experts models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeprune.errors import called_from_python

if TYPE_CHECKING:
    from moeprune.calibration.analysis import analyze, load_analysis, save_analysis
    from moeprune.data.datasets import open_data
    from moeprune.errors import MoepruneError
    from moeprune.evaluation.evaluate import evaluate
    from moeprune.models.adopted import adopt
    from moeprune.models.export import export
    from moeprune.models.model import save
    from moeprune.models.opening import load
    from moeprune.models.runtime import Runtime
    from moeprune.pruning.prune import prune

__version__ = "0.1.0"

__all__ = [
    "MoepruneError", "Runtime", "adopt", "analyze", "evaluate", "export", "load", "load_analysis", "open_data", "prune",
    "save", "save_analysis",
]  # fmt: skip

_HOMES = {
    "MoepruneError": "errors", "Runtime": "models.runtime", "adopt": "models.adopted",
    "analyze": "calibration.analysis", "evaluate": "evaluation.evaluate", "export": "models.export",
    "load": "models.opening", "load_analysis": "calibration.analysis", "open_data": "data.datasets",
    "prune": "pruning.prune", "save": "models.model", "save_analysis": "calibration.analysis",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `moeprune --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moeprune' has no attribute {name!r}")
    found = getattr(import_module(f"moeprune.{_HOMES[name]}"), name)
    globals()[name] = found if isinstance(found, type) else called_from_python(found)
    return globals()[name]
