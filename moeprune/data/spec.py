"""Which data a command or a caller means; no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

from moeprune.records import Record


class DataSpec(Record, frozen=True, kw_only=True):
    """Data by its spec, see moeprune.data.datasets.

    split: of a built-in data set; None for the default of the task. limit: samples to take at most.
    """

    spec: str
    split: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
