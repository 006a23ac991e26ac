"""Checkpoints into models."""

from __future__ import annotations

from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import Header, read_header, require_unchanged
from moeprune.models.description import read_description
from moeprune.models.model import Model, remember_fingerprint
from moeprune.models.tensors import load_strictly


def load(path: str | Path | Header, factory: str | None = None) -> Model:
    """Load a checkpoint that moeprune wrote, pruned or not: a model in eval mode on the CPU.

    The weights are memory-mapped from the file.

    Args:
        path: of the checkpoint, or its header.
        factory: `package.module:function` that builds the model, where it is of the user's own code.
            The checkpoint names it too, but only a caller can tell that it may be run.

    Raises:
        MoepruneError: the file is missing, damaged, of an unknown format, has no Soft MoE layer,
            lacks tensors or has others, or has NaN or infinite values; or the factory is missing or
            another one than the checkpoint names.
    """
    header = read_header(path)
    config, plan, details = read_description(header)
    fingerprint = checkpoint.fingerprint(header, config.to_json())
    try:
        model = config.build(plan, details, factory)
    except MoepruneError as error:
        raise MoepruneError(f"`{header.path}`: {error.message}", error.hint) from None
    load_strictly(model, checkpoint.read_tensors(header), header.path)
    require_unchanged(header)
    model = model.requires_grad_(False).eval()
    remember_fingerprint(model, fingerprint)
    return model
