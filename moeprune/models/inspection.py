"""Contents of a checkpoint; imports torch only if another program wrote it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from moeprune.models.description import our_header, read_description, with_options
from moeprune.models.folders.layout import read_folder
from moeprune.models.request import ModelSpec
from moeprune.models.results import InspectedLayer, Inspection
from moeprune.records import to_json

if TYPE_CHECKING:
    from moeprune.models.model import Model


class Described:
    """The config, plan, details and tensors of a checkpoint; a model of moeprune is built only if it is used.

    offload: the weights of its model are to stay on disk.
    """

    def __init__(self, spec: ModelSpec, offload: bool = False):
        spec.require_offloadable(offload)
        self.spec, self.header, self.offload = spec, our_header(spec.path), offload
        if self.header is None or spec.foreign_only:
            from moeprune.files.checkpoint import tensor_infos

            self.config, self.plan, self.details = self.model.config, self.model.plan, self.model.details
            self.tensors = tensor_infos(self.model.state_dict())
        else:
            self.config, self.plan, details = read_description(self.header)
            self.details = with_options(details, spec, self.config.num_classes)
            self.tensors = self.header.tensors

    @cached_property
    def model(self) -> Model:
        """The model, with the preprocessing of the spec."""
        from moeprune.models.opening import open_model

        return open_model(self.spec, header=self.header, offload=self.offload)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture and all tensors."""
        from moeprune.files import checkpoint
        from moeprune.models.model import fingerprint

        if self.header is None:
            return fingerprint(self.model)
        return checkpoint.fingerprint(self.header, self.config.to_json())


def inspect_checkpoint(spec: ModelSpec) -> Inspection:
    """Return the contents of a checkpoint: from headers if moeprune or transformers wrote it, else from the model."""
    if spec.is_model_folder:
        return _inspect_folder(spec.path)
    found = Described(spec)
    reading = found.model.reading if found.header is None or spec.model is not None else None
    layers = {
        name: InspectedLayer(
            family=settings.pop("family"),
            experts=settings.pop("num_experts"),
            settings=settings,
            parameters=sum(tensor.numel for key, tensor in found.tensors.items() if key.startswith(f"{name}.")),
            plan=found.plan.get(name),
        )
        for name, settings in to_json(found.config.moe_layers).items()
    }
    return Inspection(
        checkpoint=str(spec.path),
        architecture=found.config.to_json(),
        preprocessing=to_json(found.details.preprocessing.effective),
        states_normalisation=found.details.preprocessing.states_normalisation,
        class_names=list(found.details.classes),
        layers=layers,
        source=found.details.source,
        provenance=found.details.provenance,
        reading=reading,
        **asdict(found.config.cost(found.plan, found.tensors)),
    )


def _inspect_folder(path: Path) -> Inspection:
    """Return what a folder of transformers holds, from its config and headers."""
    folder = read_folder(path)
    sizes = {
        "model_type": folder.model_type,
        "blocks": folder.num_layers,
        "vocabulary": folder.vocabulary,
        "longest": folder.longest,
    }
    layers = {
        name: InspectedLayer(
            family="gated_moe",
            experts=layer.num_experts,
            settings={"gates": folder.gates, "top_k": layer.top_k, "groups": layer.groups},
            parameters=layer.parameters,
            plan=layer.plan,
        )
        for name, layer in folder.layers.items()
    }
    return Inspection(
        checkpoint=str(path),
        architecture={"type": "language", **sizes},
        preprocessing={},
        states_normalisation=True,
        class_names=[],
        layers=layers,
        source={"library": "transformers", "version": folder.config.get("transformers_version", "unknown")},
        provenance=folder.provenance,
        reading=None,
        **asdict(folder.cost()),
    )
