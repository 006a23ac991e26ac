"""Facts about a data set; no torch."""

from __future__ import annotations

from moeprune.records import Result


class DataInfo(Result, frozen=True):
    """Data that a model ran on.

    fingerprint: SHA-256 of all inputs and labels as the model gets them.
    """

    spec: str
    samples: int
    fingerprint: str
