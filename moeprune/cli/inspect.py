"""`moeprune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeprune.cli.reporter import Reporter


def inspect(
    reporter: Reporter, *, checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint.")]
) -> None:
    """Show the contents of a checkpoint.

    Layers, experts, parameters, size, FLOPs, plan and provenance, from the file's header alone.
    """
    from msgspec.structs import asdict

    from moeprune.files.header import read_header
    from moeprune.models.cost import size_and_cost
    from moeprune.models.description import read_description
    from moeprune.models.results import InspectedLayer, Inspection
    from moeprune.records import to_json

    header = read_header(checkpoint)
    config, plan, details = read_description(header)
    layers = {
        name: InspectedLayer(
            experts=layer.num_experts,
            slots_per_expert=layer.terms_per_expert,
            hidden_dim=getattr(layer, "hidden_dim", None),
            parameters=sum(t.numel for key, t in header.tensors.items() if key.startswith(f"{name}.")),
            plan=plan.get(name),
        )
        for name, layer in config.moe_layers.items()
    }
    found = Inspection(
        checkpoint=str(checkpoint),
        architecture=config.to_json(),
        preprocessing=to_json(details.preprocessing),
        layers=layers,
        source=details.source,
        provenance=details.provenance,
        **asdict(size_and_cost(config, plan, header.tensors)),
    )
    reporter.emit(found)
