"""The report of `moeprune inspect`."""

from __future__ import annotations

from moeprune.models.results import Inspection
from moeprune.report.document import Block, Document, Facts, Table
from moeprune.report.export import facts_of
from moeprune.report.words import amount, flops_in_words, plain, plan_in_words, plural


def inspection(result: Inspection) -> Document:
    """Return contents, layers and kept experts of a checkpoint."""
    kind, shape = _architecture(result)
    facts = [
        ("model", f"{kind}, {result.architecture['num_classes']} classes"),
        ("input", f"{' × '.join(map(str, shape))} (channels × height × width)"),
        ("preprocessing", ", ".join(f"{key} {plain(value)}" for key, value in result.preprocessing.items())),
        ("parameters", f"{amount(result.parameters)} ({amount(result.bytes, 'B')})"),
        ("FLOPs per input", flops_in_words(result.flops_per_input)),
    ]
    for title, values in (("source", result.source), ("provenance", result.provenance)):
        facts += [(f"{title}: {name}", plain(value)) for name, value in values.items()]
    if result.reading is not None:
        facts += facts_of(result.reading)
    rows = [
        (
            name,
            layer.family,
            str(layer.experts),
            amount(layer.parameters),
            plain(layer.settings),
            "dense" if layer.plan is None else plan_in_words(layer.plan),
        )
        for name, layer in result.layers.items()
    ]
    kept = [
        (f"kept in {name}", plain(layer.plan.kept))
        for name, layer in result.layers.items()
        if layer.plan is not None and layer.plan.kept is not None
    ]
    blocks: list[Block] = [
        Facts(facts),
        Table(("layer", "family", "experts", "parameters", "settings", "plan"), rows),
    ]
    return Document(result.checkpoint, [*blocks, *([Facts(kept)] if kept else [])])


def _architecture(result: Inspection) -> tuple[str, list[int]]:
    """Return the kind of model, and the shape of an input."""
    architecture = result.architecture
    if architecture["type"] == "module":
        arguments = ", ".join(f"{key}={value!r}" for key, value in architecture["arguments"].items())
        return plain(f"{architecture['factory']}({arguments})"), architecture["input_shape"]
    depth = plural(len(architecture["blocks"]), "block")
    kind = f"{architecture['type']}, {depth}, d = {architecture['dim']}"
    return kind, [architecture["in_channels"], *architecture["image_size"]]
