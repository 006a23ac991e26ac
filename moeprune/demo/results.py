"""Results of the demo; no torch."""

from __future__ import annotations

from moeprune.data.spec import DataInfo
from moeprune.evaluation.results import Environment
from moeprune.pruning.results import SweepRow
from moeprune.records import Report, Result


class DemoModel(Result, frozen=True):
    """One shipped model pruned in several ways; the first row is the full model."""

    title: str
    data: DataInfo
    rows: list[SweepRow]


class Summary(Report, frozen=True):
    """All models of the demo by name; directory: of their files, `.` in the `summary.json` in it."""

    directory: str
    models: dict[str, DemoModel]
    environment: Environment
