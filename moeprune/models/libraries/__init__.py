"""The libraries whose checkpoints moeprune reads and writes, and what else a file may be; no torch."""

from __future__ import annotations

from moeprune.errors import MoepruneError
from moeprune.models.libraries.bwconrad import SoftMoEPackage
from moeprune.models.libraries.interface import Source, Tensors
from moeprune.models.libraries.lookalikes import lookalike

SOURCES: dict[str, Source] = {source.name: source for source in (SoftMoEPackage(),)}
"""By name on the command line."""

LAYER_LIBRARIES = ("soft-moe-pytorch", "soft-mixture-of-experts")
"""Those whose layers stand in models that only the user's own code builds."""


def pick_source(tensors: Tensors, path: str, name: str | None = None) -> Source:
    """The library that wrote a file with these tensors.

    Args:
        name: what the user says that it is.

    Raises:
        MoepruneError: the name is unknown, no library fits, or several do.
    """
    if name is not None:
        if name not in SOURCES:
            raise MoepruneError(f"`--source {name}` is unknown", f"give one of {', '.join(SOURCES)}")
        return SOURCES[name]
    fitting = [source for source in SOURCES.values() if source.fits(tensors)]
    if not fitting:
        raise unknown_layout(tensors, path)
    if len(fitting) > 1:
        names = " and ".join(f"`{source.name}`" for source in fitting)
        raise MoepruneError(f"`{path}` may be of {names}: its tensors fit both", "say which with `--source`")
    return fitting[0]


def unknown_layout(tensors: Tensors, path: str) -> MoepruneError:
    """The error of a file that is of no known library: what it is instead, if that is known."""
    hint = f"known layouts are {', '.join(SOURCES)}; say which with `--source`"
    if found := lookalike(tensors):
        return MoepruneError(f"no Soft MoE model of a known library in `{path}`: {found}", hint)
    return MoepruneError(
        f"no Soft MoE layers in `{path}` (none of its {len(tensors)} tensors matches a known layout)", hint
    )


def not_ours(tensors: Tensors, path: str) -> MoepruneError:
    """The error of a file that moeprune did not write: whose it is, and how to convert it."""
    fitting = [source for source in SOURCES.values() if source.fits(tensors)]
    if not fitting:
        return unknown_layout(tensors, path)
    names = " or ".join(f"`{source.name}`" for source in fitting)
    return MoepruneError(
        f"`{path}` is a checkpoint of {names}, not of moeprune",
        f"convert it first: `moeprune convert {path} --source {fitting[0].name} -o converted.safetensors`",
    )
