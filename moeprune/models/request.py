"""Options of `moeprune inspect` and `moeprune export`; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moeprune.errors import MoepruneError
from moeprune.models.spec import LIBRARIES, ModelSpec
from moeprune.records import Request, option

Checkpoint = Annotated[
    ModelSpec, option("A checkpoint: of moeprune, a known library or your own model.", argument="CKPT")
]


class InspectRequest(Request, frozen=True, kw_only=True):
    """A checkpoint to look at."""

    checkpoint: Checkpoint


class ExportRequest(Request, frozen=True, kw_only=True):
    """A checkpoint, and the library to write it for."""

    checkpoint: Checkpoint
    to: Annotated[str, option("Library: soft-moe, soft-moe-pytorch or soft-mixture-of-experts.")]
    output: Annotated[Path, option("File to write: .pt, .pth or .bin, else safetensors.", short=("-o",))]

    def check(self) -> None:
        """Raise a MoepruneError if the library is unknown."""
        if self.to not in LIBRARIES:
            raise MoepruneError(f"`to` is {self.to!r}", f"give one of {', '.join(LIBRARIES)}")
