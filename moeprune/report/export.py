"""The report of `moeprune export`, and facts about a checkpoint of another program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.models.results import Export, Parity, Reading
from moeprune.report.document import Document, Facts
from moeprune.report.words import amount, plain


def export(result: Export) -> Document:
    """Return what was written, and how well the library's own model agrees."""
    facts = [
        ("to", result.to),
        ("model", f"{amount(result.model.parameters)} parameters"),
        ("built with", _assignments(result.arguments)),
        ("parity", _agreement(result.parity)),
    ]
    return Document(f"wrote {result.output}", [Facts([fact for fact in facts if fact[1]])])


def facts_of(reading: Reading) -> list[tuple[str, str]]:
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
