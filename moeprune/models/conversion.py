"""Checkpoints of other libraries: into models of ours, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.foreign import read_state_dict
from moeprune.files.header import is_safetensors, read_header
from moeprune.models.details import Details
from moeprune.models.libraries import SOURCES, pick_source
from moeprune.models.libraries.interface import Reading, Source, as_dense
from moeprune.models.libraries.modules import installed_version
from moeprune.models.model import save
from moeprune.models.opening import load
from moeprune.models.parity import Parity, compare, require_parity
from moeprune.models.vit import SoftMoEViT

OURS = "moeprune"


@dataclass(frozen=True)
class Converted:
    """A model of ours, and where it comes from.

    source: the library, or None where the file is a checkpoint of moeprune.
    reading: what its tensors and the given arguments said.
    target: the library that it was written for, or None where that is moeprune.
    parity: how far the library's own model computes the same.
    """

    model: SoftMoEViT
    source: Source | None = None
    reading: Reading | None = None
    target: Source | None = None
    parity: Parity | None = None

    def to_json(self) -> dict[str, Any]:
        """Fields of moeprune.models.results.Conversion."""
        reading = self.reading
        arguments = {} if reading is None else reading.arguments
        if self.target is not None:
            arguments = self.target.arguments(as_dense(self.model.config, self.model.plan)[0])
        return {
            "origin": _name(self.source),
            "to": _name(self.target),
            "source": self.model.details.source,
            "arguments": arguments,
            "defaults": {} if reading is None else reading.defaults,
            "dropped": [] if reading is None else reading.dropped,
            "parity": self.parity.measured if self.parity else None,
            "parity_skipped": self.parity.skipped if self.parity else None,
        }


def convert(
    path: str | Path,
    output: str | Path,
    to: str = OURS,
    source: str | None = None,
    arguments: Mapping[str, str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    key: str | None = None,
    overwrite: bool = True,
) -> Converted:
    """Write a checkpoint in another library's layout, or in ours.

    Args:
        path: of moeprune or of a library in moeprune.models.libraries.
        to: the library to write for; with a suffix .pt, .pth or .bin of the output by torch.save, else as
            safetensors.
        source: the library that wrote the file, where its tensors do not tell.
        arguments: what its tensors cannot tell, by the names of the library's constructor.
        preprocess: settings to write into the checkpoint, such as `{"resize": 256}`.
        key: which entry of a training checkpoint to take.
        overwrite: replace an output that exists.

    Returns:
        What was read, with the parity of the library that it was written for, if it was for one.

    Raises:
        MoepruneError: whatever is wrong with the file or the call, a model that the library cannot
            express, or one that it computes otherwise: nothing is written then.
    """
    if to != OURS and to not in SOURCES:
        raise MoepruneError(f"`--to {to}` is unknown", f"give one of {', '.join((OURS, *SOURCES))}")
    if to == OURS and Path(output).suffix in checkpoint.TORCH_SUFFIXES:
        raise MoepruneError(f"`{output}`: a checkpoint of moeprune is a .safetensors file", "name it so")
    read = _read(path, source, arguments or {}, to, key)
    if preprocess:
        details = read.model.details
        read.model.details = replace(details, preprocessing=details.preprocessing.updated(preprocess))
    if to == OURS:
        save(read.model, output, overwrite)
        return read
    target = SOURCES[to]
    tensors = library_tensors(read.model, target, str(path))
    parity = require_parity(compare(read.model, target, tensors), target.model_class, path)
    checkpoint.write_state_dict(output, tensors, overwrite)
    return replace(read, target=target, parity=parity)


def _read(
    path: str | Path, source: str | None, arguments: Mapping[str, str], to: str, key: str | None
) -> Converted:
    if is_ours(path):
        if source is not None or arguments or key is not None:
            raise MoepruneError(
                f"`--source`, `--source-arg` and `--key` do not go with `{path}`:"
                " it is a checkpoint of moeprune"
            )
        if to == OURS:
            raise MoepruneError(f"`{path}` is a checkpoint of moeprune already", "give a library with `--to`")
        model = load(path)
        assert isinstance(model, SoftMoEViT)
        return Converted(model)
    return read_library(path, source, arguments, key)


def read_library(
    path: str | Path,
    source: str | None = None,
    arguments: Mapping[str, str] | None = None,
    key: str | None = None,
) -> Converted:
    """The model of a file of another library, on the CPU and in eval mode; see `convert`."""
    found = read_state_dict(path, key)
    tensors = found.tensors
    infos = checkpoint.tensor_infos(tensors)
    library = pick_source(infos, str(path), source)
    reading = library.read(infos, arguments or {}, str(path))
    checkpoint.check_finite({k: t for k, t in tensors.items() if k not in reading.dropped}, path)
    with torch.device("meta"):
        model = SoftMoEViT(reading.config)
    model.load_state_dict(_our_tensors(tensors, reading), assign=True)
    model = model.requires_grad_(False).eval()
    parity = require_parity(_parity_with_file(model, library, reading, tensors), library.model_class, path)
    origin = {"library": library.name, "sha256": found.sha256()}
    if version := installed_version(library.distribution):
        origin["version"] = version
    model.details = Details(source=origin)
    return Converted(model, library, reading, parity=parity)


def _our_tensors(tensors: Mapping[str, Tensor], reading: Reading) -> dict[str, Tensor]:
    """The state dict of our model, by its names and in its shapes."""
    shapes = reading.config.shapes({})
    ours = {}
    for entry in reading.entries:
        parts = [tensors[name] for name in entry.theirs]
        tensor = torch.stack(parts) if entry.split else parts[0]
        tensor = tensor.mT if entry.transposed else tensor
        ours[entry.ours] = tensor.reshape(shapes[entry.ours]).contiguous()
    return ours


def library_tensors(model: SoftMoEViT, library: Source, path: str) -> dict[str, Tensor]:
    """The state dict of the library's own model that computes what ours computes.

    Raises:
        MoepruneError: the library cannot express it; all reasons are named.
    """
    config, refused = as_dense(model.config, model.plan)
    refused += library.refusals(config)
    if refused:
        raise MoepruneError(
            f"`{library.name}` cannot express `{path}`: {'; '.join(refused)}",
            "it takes unpruned models, and those pruned with scope static and compensation renorm",
        )
    ours, theirs = model.state_dict(), {}
    assert set(ours) == {entry.ours for entry in library.entries(config)}
    for entry in library.entries(config):
        tensor = ours[entry.ours].detach()
        tensor = tensor.mT if entry.transposed else tensor
        for name, part in zip(entry.theirs, tensor.unbind() if entry.split else [tensor], strict=True):
            theirs[name] = part.reshape(entry.shape).clone(memory_format=torch.contiguous_format)
    return theirs


def _parity_with_file(
    model: SoftMoEViT, library: Source, reading: Reading, tensors: Mapping[str, Tensor]
) -> Parity:
    if refused := library.refusals(reading.config):
        return Parity(skipped=f"{library.model_class} cannot express it: {'; '.join(refused)}")
    own = tensors if reading.as_is else library_tensors(model, library, "the model")
    return compare(model, library, own)


def _name(library: Source | None) -> str:
    return OURS if library is None else library.name


def is_ours(path: str | Path) -> bool:
    """Whether a file is a checkpoint of moeprune."""
    return is_safetensors(Path(path)) and read_header(path).metadata is not None
