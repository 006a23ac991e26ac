"""The report of `moeprune convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.models.results import Conversion
from moeprune.report.document import Document, Facts
from moeprune.report.words import amount, plain


def conversion(result: Conversion) -> Document:
    """Return both sides, and how well they agree."""
    facts = [
        ("from", f"{result.checkpoint} ({result.origin})"),
        ("to", result.to),
        ("model", f"{amount(result.model.parameters)} parameters"),
    ]
    if result.arguments:
        facts.append(("built with", _assignments(result.arguments)))
    if result.defaults:
        facts.append(("taken from the library's defaults", _assignments(result.defaults)))
    if result.dropped:
        facts.append(("left out", f"{plain(result.dropped)} (the model does not use them)"))
    parity = result.parity
    if parity is not None:
        measured = (
            f"logits of {parity.images} random images differ by at most"
            f" {parity.max_relative_difference:.1e} of the largest one ({parity.dtype})"
        )
    else:
        measured = f"not measured: {result.parity_skipped}"
    facts.append(("parity", measured))
    return Document(f"wrote {result.output}", [Facts(facts)])


def _assignments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
