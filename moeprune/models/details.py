"""Metadata of a checkpoint besides architecture and plan; no torch."""

from __future__ import annotations

from typing import Any

import msgspec

from moeprune.data.preprocessing import Preprocessing
from moeprune.records import Record

FORMAT = 1
"""The format of checkpoints."""


class Details(Record, frozen=True):
    """Preprocessing and origin of a model.

    source: where the weights came from: `library`, `version`, and for foreign files `sha256`.
    provenance: how they were made: training, or calibration data, seed and versions.
    """

    preprocessing: Preprocessing = Preprocessing()
    source: dict[str, Any] = msgspec.field(default_factory=dict)
    provenance: dict[str, Any] = msgspec.field(default_factory=dict)
