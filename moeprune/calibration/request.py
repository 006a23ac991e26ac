"""Options of `moeprune analyze`; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moeprune.data.spec import DataSpec
from moeprune.models.request import Checkpoint
from moeprune.models.runtime import Runtime
from moeprune.records import Request, option


class AnalyzeRequest(Request, frozen=True, kw_only=True):
    """An unpruned checkpoint, calibration data, and the file of the analysis."""

    checkpoint: Checkpoint
    data: Annotated[DataSpec, option("Calibration data: digits, pairs, a .npz, a .safetensors, or a folder.")]
    output: Annotated[Path, option("The analysis to write (.safetensors).", short=("-o",))]
    overwrite: bool = False
    runtime: Runtime = Runtime()
