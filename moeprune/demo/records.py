"""Options and results of `moeprune demo`; no torch."""

from pathlib import Path
from typing import Annotated

from moeprune.data.spec import DataInfo
from moeprune.errors import MoepruneError
from moeprune.evaluation.language_results import LanguageDifference, LanguageFigures
from moeprune.evaluation.results import Environment
from moeprune.pruning.request import Seed
from moeprune.pruning.results import SweepRow
from moeprune.records import Report, Request, Result, option


class DemoRequest(Request, frozen=True, kw_only=True):
    """A directory to write into."""

    output: Annotated[Path, option("The directory to write into.", short=("-o",))] = Path("moeprune-demo")
    train: Annotated[bool, option("Train the models again first (minutes), as the shipped ones were.")] = False
    device: Annotated[str, option("cpu, cuda, cuda:N, mps, or auto: CUDA if there is one, else the CPU.")] = "auto"
    seed: Seed = 0
    overwrite: bool = False

    def check(self) -> None:
        """Raise a MoepruneError if the directory is a file, or holds files that may not be replaced."""
        if self.output.exists() and not self.output.is_dir():
            raise MoepruneError(f"`{self.output}` is a file, expected a directory", "give another with `-o`")
        if self.output.is_dir() and any(self.output.iterdir()) and not self.overwrite:
            hint = "give another with `-o`, or `--force` to write into it"
            raise MoepruneError(f"`{self.output}` is not empty", hint)


class DemoModel(Result, frozen=True):
    """One shipped model pruned in several ways; the first row is the full model."""

    title: str
    data: DataInfo
    rows: list[SweepRow]


class LanguageRow(Result, frozen=True):
    """The language model pruned in one way to a share of its experts, or of their hidden units; label: None in full."""

    label: str | None
    keep: str
    model: LanguageFigures
    difference: LanguageDifference


class DemoLanguage(Result, frozen=True):
    """The shipped language model pruned in several ways; the first row is the full model."""

    title: str
    data: DataInfo
    rows: list[LanguageRow]


class Summary(Report, frozen=True):
    """All models of the demo by name; directory: of their files, `.` in the `summary.json` in it.

    language: None where transformers is not installed.
    """

    directory: str
    models: dict[str, DemoModel]
    language: DemoLanguage | None
    environment: Environment
