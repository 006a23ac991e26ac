"""Checkpoints of models of the user's own code: into models with our layers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.data.preprocessing import Preprocessing
from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.foreign import read_state_dict
from moeprune.files.header import is_safetensors, read_header
from moeprune.models.adopted import adopt, library_tensors, load_foreign, parse_source
from moeprune.models.details import Details
from moeprune.models.libraries.modules import installed_version
from moeprune.models.model import save
from moeprune.models.module import AdoptedModel, build
from moeprune.models.opening import load
from moeprune.models.parity import Parity, difference, require_parity


@dataclass(frozen=True)
class Adopted:
    """A model of the user's own code, and where its checkpoint comes from or goes to."""

    model: AdoptedModel
    source: str
    target: str
    parity: Parity

    def to_json(self) -> dict[str, Any]:
        """Fields of moeprune.models.results.Conversion."""
        config = self.model.config
        return {
            "origin": self.source,
            "to": self.target,
            "source": self.model.details.source,
            "arguments": config.arguments,
            "defaults": {},
            "dropped": [],
            "parity": self.parity.measured,
            "parity_skipped": self.parity.skipped,
        }


def adopt_file(
    path: str | Path,
    output: str | Path,
    factory: str,
    arguments: Mapping[str, Any],
    input_shape: tuple[int, int, int],
    key: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    source: str | None = None,
    overwrite: bool = True,
) -> Adopted:
    """Load a checkpoint into the model that a factory builds, adopt its layers, and write it as ours.

    Args:
        path: of the checkpoint that the user's code wrote.
        output: the file to write.
        factory: `package.module:function`. Its code is run.
        arguments: keyword arguments of the factory.
        input_shape: of one input (c,H,W).
        key: which entry of a training checkpoint to take.
        preprocess: settings to write into the checkpoint, such as `{"resize": 256}`.
        source: see moeprune.models.adopted.adopt.
        overwrite: replace an output that exists.

    Returns:
        The model, and how far it computes what the user's own does.

    Raises:
        MoepruneError: whatever is wrong with the file, the factory or the model: nothing is written then.
    """
    found = read_state_dict(path, key)
    checkpoint.check_finite(found.tensors, path)
    module = build(factory, arguments)
    load_foreign(module, found.tensors, path)
    own = build(factory, arguments)
    load_foreign(own, found.tensors, path)
    model = adopt(module, input_shape, factory, arguments, source=source)
    libraries = {layer.library for layer in model.config.layers.values()}
    installed = {library: installed_version(library) or "unknown" for library in sorted(libraries)}
    named, version = parse_source(source)
    versions = installed if named is None or version is None else {**installed, named: version}
    origin = {
        "library": ", ".join(versions),
        "version": ", ".join(versions.values()),
        "sha256": found.sha256(),
    }
    model.details = Details(Preprocessing().updated(preprocess or {}), source=origin)
    if versions != installed:
        assert named is not None
        parity = Parity(skipped=f"`{named}` {installed[named]} is installed, not {version}")
    else:
        parity = difference(model, own, input_shape)
        require_parity(parity, f"the model of `{factory}`", path)
    save(model, output, overwrite)
    return Adopted(model, origin["library"], "moeprune", parity)


def give_back(
    path: str | Path, output: str | Path, to: str, factory: str | None, overwrite: bool = True
) -> Adopted:
    """Write a checkpoint of ours as the state dict of the user's own model.

    Args:
        path: of a checkpoint that `adopt_file` wrote, unpruned or statically pruned with `renorm`.
        output: the file to write; with a suffix .pt, .pth or .bin by torch.save, else as safetensors.
        to: the library that its layers are of.
        factory: that the checkpoint names. Its code is run.
        overwrite: replace an output that exists.

    Raises:
        MoepruneError: the checkpoint is none of such a model, or the library cannot express it.
    """
    model = load(path, factory)
    assert isinstance(model, AdoptedModel)
    libraries = {layer.library for layer in model.config.layers.values()}
    if to not in libraries:
        raise MoepruneError(
            f"the layers of `{path}` are of {', '.join(sorted(libraries))}, not of `{to}`",
            f"give `--to {min(libraries)}`",
        )
    assert model.config.factory is not None
    module = build(model.config.factory, model.config.arguments)
    checkpoint.write_state_dict(output, library_tensors(model, module), overwrite)
    skipped = "the tensors were checked when the model was taken in"
    return Adopted(model, "moeprune", to, Parity(skipped=skipped))


def is_own_model(path: str | Path) -> bool:
    """Whether a file is a checkpoint of ours, of a model of the user's own code."""
    if not is_safetensors(Path(path)):
        return False
    header = read_header(path)
    metadata_of_ours = header.metadata or {}
    architecture = metadata_of_ours.get("architecture")
    return isinstance(architecture, dict) and architecture.get("type") == "module"
