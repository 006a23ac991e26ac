"""The libraries whose checkpoints moeprune reads and writes."""

from moeprune.errors import MoepruneError
from moeprune.models.description import lookalike
from moeprune.models.libraries.soft_moe import SoftMoEViTs
from moeprune.models.libraries.soft_moe_config import Tensors

MODELS = {library.name: library for library in (SoftMoEViTs(),)}  # libraries of whole models by name

BUILD = "name the function that builds the model: `--model package.module:function --input-shape 3,224,224`"


def is_anchor(name: str) -> bool:
    """Return True for a name of a tensor that only models of a known library have."""
    return any(library.anchor.fullmatch(name) for library in MODELS.values())


def library_of_file(tensors: Tensors, path: str, name: str | None = None) -> SoftMoEViTs:
    """Return the library that wrote a file with these tensors; name: of the library, if the user gives it."""
    if name in MODELS:
        return MODELS[name]
    if name is not None:
        raise MoepruneError(f"no whole models of `{name}` are known, only its layers", BUILD)
    fitting = [library for library in MODELS.values() if library.fits(tensors)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(f"`{library.name}`" for library in fitting)
        raise MoepruneError(f"the tensors of `{path}` fit {names}", "name the library with `--source`")
    raise MoepruneError(
        f"`{path}` is not a model of a known library: {lookalike(tensors)}",
        f"whole models are read of {', '.join(MODELS)}, and folders of transformers whose `config.json` names a"
        f" `model_type`; for any other {BUILD}",
    )
