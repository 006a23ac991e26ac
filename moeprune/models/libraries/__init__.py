"""The libraries whose checkpoints moeprune reads and writes."""

from __future__ import annotations

from moeprune.errors import MoepruneError
from moeprune.models.libraries.interface import LayerLibrary, ModelLibrary, Tensors
from moeprune.models.libraries.own import OwnLayers
from moeprune.models.libraries.soft_mixture_of_experts import SoftMixtureOfExperts
from moeprune.models.libraries.soft_moe import SoftMoELayers
from moeprune.models.libraries.soft_moe_pytorch import SoftMoEPytorch
from moeprune.models.libraries.soft_moe_vit import SoftMoEViTs
from moeprune.models.lookalikes import lookalike

MODELS: dict[str, ModelLibrary] = {library.name: library for library in (SoftMoEViTs(),)}
"""Libraries of whole models by name."""

LAYERS: dict[str, LayerLibrary] = {
    library.name: library
    for library in (SoftMoELayers(), SoftMoEPytorch(), SoftMixtureOfExperts(), OwnLayers())
}
"""Libraries of layers by name; the models around the layers are built by the user's own code."""


def library_of_file(tensors: Tensors, path: str, name: str | None = None) -> ModelLibrary:
    """Return the library that wrote a file with these tensors.

    Args:
        name: of the library, if the user gives it.

    Raises:
        MoepruneError: the name is unknown, no library fits, or several do.
    """
    if name is not None:
        if name not in MODELS:
            raise MoepruneError(
                f"no whole models of `{name}` are known", f"known are those of {', '.join(MODELS)}"
            )
        return MODELS[name]
    fitting = [library for library in MODELS.values() if library.fits(tensors)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(f"`{library.name}`" for library in fitting)
        raise MoepruneError(f"the tensors of `{path}` fit {names}", "name the library with `--source`")
    raise MoepruneError(
        f"`{path}` is not a model of a known library: {lookalike(tensors)}",
        f"known layouts are {', '.join(MODELS)}; name one with `--source`, or say what builds the model with"
        " `--model package.module:function` and `--input-shape`",
    )
