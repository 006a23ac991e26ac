"""Checkpoints into models."""

from __future__ import annotations

from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.models.description import read_description
from moeprune.models.model import Model
from moeprune.models.tensors import load_strictly


def load(path: str | Path, factory: str | None = None) -> Model:
    """Load a checkpoint that moeprune wrote, pruned or not: a model in eval mode on the CPU.

    The weights are memory-mapped from the file.

    Args:
        path: of the checkpoint.
        factory: `package.module:function` that builds the model, where it is of the user's own code.
            The checkpoint names it too, but only a caller can tell that it may be run.

    Raises:
        MoepruneError: the file is missing, damaged, of an unknown format, has no Soft MoE layer,
            lacks tensors or has others, or has NaN or infinite values; or the factory is missing or
            another one than the checkpoint names.
    """
    version = checkpoint.version_of(path)
    file = checkpoint.read(path)
    config, plan, details = read_description(file.header)
    checkpoint.check_finite_in_file(file.header)
    try:
        model = config.build(plan, details, factory)
    except MoepruneError as error:
        raise MoepruneError(f"`{path}`: {error.message}", error.hint) from None
    load_strictly(model, file.tensors, path)
    if checkpoint.version_of(path) != version:
        raise MoepruneError(f"`{path}` was replaced while it was read", "try again")
    return model.requires_grad_(False).eval()
