"""The reports of `moeprune inspect` and `moeprune export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.models.results import Export, Inspection, Parity, Reading
from moeprune.report.document import Document, Facts, Table
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
    rows, kept = [], []
    for name, layer in result.layers.items():
        plan = "dense" if layer.plan is None else plan_in_words(layer.plan)
        size = amount(layer.parameters)
        rows.append((name, layer.family, str(layer.experts), size, plain(layer.settings), plan))
        if layer.plan is not None and layer.plan.kept is not None:
            kept.append((f"kept in {name}", plain(layer.plan.kept)))
    layers = Table(("layer", "family", "experts", "parameters", "settings", "plan"), rows)
    return Document(result.checkpoint, [Facts(facts), layers, *([Facts(kept)] if kept else [])])


def _architecture(result: Inspection) -> tuple[str, list[int]]:
    """Return the kind of model, and the shape of an input."""
    architecture = result.architecture
    if architecture["type"] == "module":
        arguments = _assignments(architecture["arguments"])
        return plain(f"{architecture['factory']}({arguments})"), architecture["input_shape"]
    depth = plural(len(architecture["blocks"]), "block")
    kind = f"{architecture['type']}, {depth}, d = {architecture['dim']}"
    return kind, [architecture["in_channels"], *architecture["image_size"]]


def export(result: Export) -> Document:
    """Return what was written, and how well the library's own model agrees."""
    model, arguments = f"{amount(result.model.parameters)} parameters", _assignments(result.arguments)
    facts = [("to", result.to), ("model", model), ("built with", arguments), _parity(result.parity)]
    return Document(f"wrote {result.output}", [Facts([fact for fact in facts if fact[1]])])


def _reading(reading: Reading) -> list[tuple[str, str]]:
    """Return what was read from a checkpoint that moeprune did not write."""
    facts = [
        ("read as", reading.library),
        ("built with", _assignments(reading.arguments)),
        ("taken from the library's defaults", _assignments(reading.defaults)),
        ("left out", f"{plain(reading.dropped)} (the model does not use them)" if reading.dropped else ""),
        _parity(reading.parity),
    ]
    return [fact for fact in facts if fact[1]]


def _parity(parity: Parity) -> tuple[str, str]:
    if parity.max_relative_difference is None:
        return "parity", f"not measured: {parity.skipped}"
    most = f"{parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
    return "parity", f"logits of {parity.images} random images differ by at most {most}"


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
