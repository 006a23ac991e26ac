"""A data spec with its options, and facts about the data that it names; no torch."""

from typing import Annotated

from moeprune.errors import MoepruneError
from moeprune.plan import Positive
from moeprune.records import Request, Result, option

BUILT_IN = ("digits", "pairs")
SPECS_HINT = (
    "give `digits`, `pairs` (each with `:train`, `:calibration` or `:test`), a `.npz` or"
    " `.safetensors` file with `inputs` and `labels`, or a folder of class folders of images"
)


class DataSpec(Request, frozen=True, kw_only=True):
    """Data by its spec, see moeprune.data.datasets.

    split: of a built-in data set; None for the default of the task. limit: samples to take at most.
    """

    spec: str
    split: Annotated[str | None, option("Split of a built-in data set: train, calibration or test.")] = None
    limit: Annotated[Positive | None, option("Take only so many samples, drawn with a fixed seed.")] = None

    def check(self) -> None:
        """Raise a MoepruneError if a split is given of data that has none."""
        if self.split is not None and self.spec not in BUILT_IN:
            hint = f"it picks a split of {' or '.join(BUILT_IN)}"
            raise MoepruneError(f"`--split {self.split}` does not go with `{self.spec}`", hint)


class DataInfo(Result, frozen=True):
    """Data that a model ran on.

    fingerprint: SHA-256 of all inputs and labels as the model gets them.
    """

    spec: str
    samples: int
    fingerprint: str
