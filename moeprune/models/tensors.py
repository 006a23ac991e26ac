"""Checks of tensors by name, shape and type; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeprune.errors import MoepruneError
from moeprune.files.header import FLOATS, TensorInfo
from moeprune.layers.interface import Shapes

if TYPE_CHECKING:
    from torch import Tensor, nn


def differences(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """In words, what is missing, unexpected, or of another shape; sorted by name within each."""
    both = sorted(set(found) & set(expected))
    return [
        *(f"missing `{name}`" for name in sorted(set(expected) - set(found))),
        *(f"unexpected `{name}`" for name in sorted(set(found) - set(expected))),
        *(
            f"`{name}` is {list(found[name])}, expected {list(expected[name])}"
            for name in both
            if tuple(found[name]) != tuple(expected[name])
        ),
    ]


def require_tensors(found: Mapping[str, TensorInfo], expected: Shapes, path: str | Path) -> None:
    """Raise a MoepruneError that lists all missing and unexpected tensors, wrong shapes and types."""
    problems = differences({name: info.shape for name, info in found.items()}, expected)
    problems += [
        f"`{name}` has the type {found[name].dtype}, expected floats"
        for name in sorted(set(found) & set(expected))
        if found[name].dtype not in FLOATS
    ]
    if problems:
        raise MoepruneError(f"`{path}` does not fit its own architecture: {'; '.join(problems)}")


def require_one_type(tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Raise a MoepruneError that names the tensors whose type is not that of most of them.

    Scores (`score_weights`) are float32 beside weights of any type.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("score_weights")}
    [(usual, _)] = Counter(tensor.dtype for tensor in weights.values()).most_common(1)
    if odd := [f"`{name}` is {t.dtype}" for name, t in sorted(weights.items()) if t.dtype != usual]:
        raise MoepruneError(
            f"`{path}` has tensors of several types: {', '.join(odd)}, the others are {usual}",
            "convert the model to one type, for example with `model.float()`",
        )


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Give a module the tensors of a file, which must be all of its own and no others.

    Raises:
        MoepruneError: tensors are missing, unexpected, of other shapes, or no floats where the module has
            some; all are listed.
    """
    own = module.state_dict()
    problems = differences(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in own.items()},
    )
    problems += [
        f"`{name}` has the type {tensors[name].dtype}, expected {own[name].dtype}"
        for name in sorted(set(tensors) & set(own))
        if tensors[name].is_floating_point() != own[name].is_floating_point()
    ]
    if problems:
        raise MoepruneError(
            f"`{path}` does not fit the model that its factory builds: {'; '.join(problems)}",
            "give the factory and the `--model-arg` that it was trained with",
        )
    module.load_state_dict(dict(tensors), assign=True)
