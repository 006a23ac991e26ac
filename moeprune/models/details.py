"""Metadata of a checkpoint besides architecture and plan; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeprune.data.preprocessing import Preprocessing

FORMAT = 1
"""The format of checkpoints."""


@dataclass(frozen=True)
class Details:
    """Preprocessing and origin of a model.

    source: where the weights came from: `library`, `version`, and for foreign files `sha256`.
    provenance: how they were made: training, or calibration data, seed and versions.
    """

    preprocessing: Preprocessing = Preprocessing()
    source: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
