"""Interfaces to other libraries: their layers, and the whole models that they build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from moeprune.files.header import TensorInfo
from moeprune.models.architecture import ViTConfig
from moeprune.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moeprune.layers.interface import LayerConfig

Tensors = Mapping[str, TensorInfo]
"""The tensors of a file by name, without their values."""


class LayerLibrary(Protocol):
    """A library whose layers are replaced by ours inside a model of the user's own code.

    name: on PyPI and on the command line.
    """

    name: str

    def recognises(self, module: nn.Module) -> bool:
        """Return True for a layer of this library."""

    def describe(
        self, module: nn.Module, name: str, tokens: int, version: str | None
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        """Return the config of our layer that computes the same, and its tensors.

        Args:
            module: a layer of the library.
            name: of the layer, for errors.
            tokens: m, of one input.
            version: of the library, if the user names it.

        Raises:
            MoepruneError: ours cannot compute the same.
        """

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of our layer under the names of the library.

        Args:
            module: a layer of the library with any number of experts.
            tensors: of our layer, unpruned or with fewer experts.
        """

    def rename(self, tensors: Mapping[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
        """Return the tensors of a model, those of old releases under the expected names."""
        return dict(tensors)


@dataclass(frozen=True)
class Entry:
    """One of our tensors, and the library's tensors that hold the same values.

    ours: its name in our model. theirs: names in the library. shape: of each of those.
    transposed: their last two axes are swapped in ours.
    split: there is one tensor for each expert; ours is the stack of them.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    split: bool = False


@dataclass(frozen=True)
class Layout:
    """The model in a file of a library, from its tensors and the given arguments.

    arguments: of the library's own constructor, as JSON values.
    defaults: those of them that are the library's defaults.
    dropped: tensors that the model does not use.
    as_is: True if the library's own class loads the tensors of the file unchanged.
    """

    config: ViTConfig
    entries: list[Entry]
    arguments: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    as_is: bool = True


class ModelLibrary(Protocol):
    """A library whose whole models are read and written.

    name: on PyPI and on the command line. model_class: the class that loads what is written.
    """

    name: str
    model_class: str

    def fits(self, tensors: Tensors) -> bool:
        """Return True if the names of the tensors are those of this library."""

    def read(self, tensors: Tensors, given: Mapping[str, Any], path: str) -> Layout:
        """Return the layout of a file of the library.

        Args:
            given: arguments of the library's constructor that the tensors do not show.
            path: of the file, for errors.

        Raises:
            MoepruneError: tensors are missing, unexpected or contradict each other; an argument is
                unknown, missing, or contradicts the tensors.
        """

    def refusals(self, config: ViTConfig) -> list[str]:
        """Return every reason why the library cannot express a dense model of this architecture."""

    def entries(self, config: ViTConfig) -> list[Entry]:
        """Return all tensors of a dense model that the library can express."""

    def arguments(self, config: ViTConfig) -> dict[str, Any]:
        """Return the arguments of the library's own class, as JSON values."""

    def build(self, config: ViTConfig) -> Any:
        """Return the library's own model of an architecture that it can express, with random weights.

        Raises:
            ImportError: the library is not installed.
        """


def as_dense(config: ViTConfig, plan: Plan) -> tuple[ViTConfig, list[str]]:
    """Return the dense architecture that computes the same as a pruned one, and all reasons against it."""
    refused = [reason for name, layer in plan.items() if (reason := not_dense(name, layer))]
    blocks = list(config.blocks)
    for index, block in enumerate(blocks):
        layer = plan.get(f"blocks.{index}.soft_moe")
        if block.soft_moe is not None and layer is not None and layer.k:
            blocks[index] = block.replace(soft_moe=block.soft_moe.replace(num_experts=layer.k))
    return config.replace(blocks=tuple(blocks)), refused


def not_dense(name: str, plan: LayerPlan) -> str | None:
    """Return why no dense layer of fewer experts computes the same as a pruned one; None if one does."""
    if plan.scope != "static":
        return f"layer `{name}` chooses its experts anew for each {plan.scope} (scope {plan.scope})"
    if not plan.k or (plan.compensation != "renorm" and plan.k < plan.num_experts):
        return (
            f"layer `{name}` has compensation {plan.compensation}, under which the router still weighs the"
            " dropped experts; a layer of the kept ones alone computes another function"
        )
    return None


def installed_version(library: str) -> str | None:
    """Return the version of a library in this environment, None if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
