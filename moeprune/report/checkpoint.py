"""The reports of `moeprune inspect` and `moeprune export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.models.results import Export, Inspection, Parity, Reading
from moeprune.report.document import Block, Document, Facts, Table
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
        facts += _reading(result.reading)
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


def export(result: Export) -> Document:
    """Return what was written, and how well the library's own model agrees."""
    facts = [
        ("to", result.to),
        ("model", f"{amount(result.model.parameters)} parameters"),
        ("built with", _assignments(result.arguments)),
        ("parity", _agreement(result.parity)),
    ]
    return Document(f"wrote {result.output}", [Facts([fact for fact in facts if fact[1]])])


def _reading(reading: Reading) -> list[tuple[str, str]]:
    """Return what was read from a checkpoint that moeprune did not write."""
    facts = [
        ("read as", reading.library),
        ("built with", _assignments(reading.arguments)),
        ("taken from the library's defaults", _assignments(reading.defaults)),
        ("left out", f"{plain(reading.dropped)} (the model does not use them)" if reading.dropped else ""),
        ("parity", _agreement(reading.parity)),
    ]
    return [fact for fact in facts if fact[1]]


def _agreement(parity: Parity) -> str:
    if parity.max_relative_difference is None:
        return f"not measured: {parity.skipped}"
    return (
        f"logits of {parity.images} random images differ by at most"
        f" {parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
    )


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
