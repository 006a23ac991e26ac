"""Contents of a checkpoint; imports torch only if another program wrote it."""

from __future__ import annotations

from msgspec.structs import asdict

from moeprune.models.description import our_header, read_description
from moeprune.models.request import ModelSpec
from moeprune.models.results import InspectedLayer, Inspection
from moeprune.records import to_json


def inspect_checkpoint(spec: ModelSpec) -> Inspection:
    """Return the contents of a checkpoint: from the header of one that moeprune wrote, else from the model.

    Raises:
        MoepruneError: the file is missing or damaged, or no known model.
    """
    header = our_header(spec.path)
    if header is None or spec.foreign_only or spec.model is not None:
        from moeprune.files.checkpoint import tensor_infos
        from moeprune.models.opening import open_model

        model = open_model(spec, header=header)
        config, plan, details = model.config, model.plan, model.details
        tensors, reading = tensor_infos(model.state_dict()), model.reading
    else:
        config, plan, details = read_description(header)
        tensors, reading = header.tensors, None
    layers = {
        name: InspectedLayer(
            family=settings.pop("family"),
            experts=settings.pop("num_experts"),
            settings=settings,
            parameters=sum(tensor.numel for key, tensor in tensors.items() if key.startswith(f"{name}.")),
            plan=plan.get(name),
        )
        for name, settings in to_json(config.moe_layers).items()
    }
    return Inspection(
        checkpoint=str(spec.path),
        architecture=config.to_json(),
        preprocessing=to_json(details.preprocessing.updated(spec.preprocess)),
        layers=layers,
        source=details.source,
        provenance=details.provenance,
        reading=reading,
        **asdict(config.cost(plan, tensors)),
    )
