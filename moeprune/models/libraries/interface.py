"""What a library is to moeprune: how its files are recognised, read and written; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from moeprune.files.header import TensorInfo
from moeprune.models.architecture import ViTConfig
from moeprune.plan import LayerPlan, Plan

Tensors = Mapping[str, TensorInfo]
"""The tensors of a file by name, without their values."""


@dataclass(frozen=True)
class Entry:
    """One of our tensors, and the library's tensors that hold the same values.

    ours: its name in our model. theirs: names in the library. shape: of each of those.
    like: the tensor in the library that says what shape these have.
    transposed: their last two axes are in the other order in ours.
    split: they are one tensor an expert; ours has them stacked along a new first axis.
    """

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    like: str
    transposed: bool = False
    split: bool = False


@dataclass(frozen=True)
class Reading:
    """What the tensors of a file and the given arguments say about its model.

    arguments: of the library's own constructor, as JSON values.
    defaults: those of them that nothing tells and that were taken from the library's defaults.
    dropped: tensors that the model does not use.
    as_is: whether the library's own class loads the file's tensors as they are.
    """

    config: ViTConfig
    entries: list[Entry]
    arguments: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    as_is: bool = True


class Source(Protocol):
    """A library whose checkpoints moeprune reads and writes."""

    name: str
    """On the command line."""
    distribution: str
    """To be installed with pip."""
    model_class: str
    """The class that loads what is written."""

    def fits(self, tensors: Tensors) -> bool:
        """Whether a file with these tensors was written by the library; only names are looked at."""

    def read(self, tensors: Tensors, given: Mapping[str, str], path: str) -> Reading:
        """The architecture of a file of the library.

        Args:
            given: what the tensors cannot tell, by the names of the library's constructor.
            path: of the file, for errors.

        Raises:
            MoepruneError: tensors are missing, unexpected or contradict each other; an argument is
                unknown, missing, or contradicts the tensors.
        """

    def refusals(self, config: ViTConfig) -> list[str]:
        """What the library cannot express of a dense model of this architecture, each in words."""

    def entries(self, config: ViTConfig) -> list[Entry]:
        """All tensors of a dense model that the library can express."""

    def arguments(self, config: ViTConfig) -> dict[str, Any]:
        """The arguments with which the library's own class is built, as JSON values."""

    def build(self, config: ViTConfig) -> Any:
        """The library's own model of an architecture that it can express, with random weights.

        Raises:
            ImportError: the library is not installed.
        """


def as_dense(config: ViTConfig, plan: Plan) -> tuple[ViTConfig, list[str]]:
    """The architecture of a dense model that computes what a pruned one computes.

    Returns:
        The architecture with fewer experts, and why there is no such model: empty where there is one.
    """
    refused = []
    blocks = list(config.blocks)
    for index, block in enumerate(blocks):
        name = f"blocks.{index}.soft_moe"
        if block.soft_moe is None or name not in plan:
            continue
        if reason := _not_dense(plan[name]):
            refused.append(f"layer `{name}` {reason}")
        else:
            blocks[index] = replace(block, soft_moe=block.soft_moe.replace(num_experts=plan[name].k))
    return replace(config, blocks=tuple(blocks)), refused


def _not_dense(plan: LayerPlan) -> str | None:
    if plan.scope != "static":
        return f"chooses its experts anew for each {plan.scope} (scope {plan.scope})"
    if plan.compensation != "renorm" and plan.k < plan.num_experts:
        return (
            f"has the compensation {plan.compensation}: the router still weighs the dropped experts, and a"
            " layer with only the kept ones would compute another function"
        )
    return None
