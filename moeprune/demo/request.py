"""Options of `moeprune demo`; no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from moeprune.errors import MoepruneError
from moeprune.pruning.request import Seed
from moeprune.records import Request, option


class DemoRequest(Request, frozen=True, kw_only=True):
    """A directory to write into."""

    output: Annotated[Path, option("The directory to write into.", short=("-o",))] = Path("moeprune-demo")
    train: Annotated[bool, option("Train both models again first (minutes), as the shipped ones were.")] = False
    device: Annotated[str, option("cpu, cuda, cuda:N, mps, or auto: CUDA if there is one, else the CPU.")] = "auto"
    seed: Seed = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raise a MoepruneError if the directory is a file, or holds files that may not be replaced."""
        if self.output.exists() and not self.output.is_dir():
            raise MoepruneError(f"`{self.output}` is a file, expected a directory", "give another with `-o`")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.overwrite:
            raise MoepruneError(
                f"`{self.output}` is not empty", "give another with `-o`, or `--force` to write into it"
            )
