"""The libraries whose checkpoints moeprune reads and writes."""

from __future__ import annotations

from moeprune.errors import MoepruneError
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.libraries.soft_moe_file import Tensors
from moeprune.models.tensors import lookalike

MODELS = {library.name: library for library in (SoftMoEViTs(),)}
"""Libraries of whole models by name."""


def library_of_file(tensors: Tensors, path: str, name: str | None = None) -> SoftMoEViTs:
    """Return the library that wrote a file with these tensors.

    Args:
        name: of the library, if the user gives it.

    Raises:
        MoepruneError: the name is unknown, no library fits, or several do.
    """
    fitting = [library for library in MODELS.values() if name == library.name or library.fits(tensors)]
    if name is not None and name not in MODELS:
        raise MoepruneError(f"no whole models of `{name}` are known", f"known are those of {', '.join(MODELS)}")
    if name is not None or len(fitting) == 1:
        return MODELS[name or fitting[0].name]
    if fitting:
        names = " and ".join(f"`{library.name}`" for library in fitting)
        raise MoepruneError(f"the tensors of `{path}` fit {names}", "name the library with `--source`")
    raise MoepruneError(
        f"`{path}` is not a model of a known library: {lookalike(tensors)}",
        f"known layouts are {', '.join(MODELS)}; name one with `--source`, or the function that builds the"
        " model with `--model package.module:function` and `--input-shape`",
    )
