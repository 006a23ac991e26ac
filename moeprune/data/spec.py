"""A data spec with its options, and facts about the data that it names; no torch."""

import os
import re
from pathlib import Path
from typing import Annotated

from moeprune.errors import MoepruneError
from moeprune.plan import Positive
from moeprune.records import Request, Result, option

BUILT_IN = ("digits", "pairs")
IDX_IMAGES = re.compile(r"(.*)images([-.]idx)3-ubyte(\.gz)?")
"""Names of files of images in the format of MNIST."""
IDX_FILES = re.compile(r".*(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
"""Names of files of images or labels in that format."""
IDX_SPLITS = {"train": "train", "calibration": "train", "test": "t10k"}
"""How the names of the files of a split begin in the format of MNIST, which has no split for calibration."""
SPECS_HINT = (
    "give `digits`, `pairs` (each with `:train`, `:calibration` or `:test`), a `.npz` or"
    " `.safetensors` file with `inputs` and `labels`, a folder of class folders of images, or a folder in the format of"
    " MNIST (`:train` or `:test`) or one of its files, such as `train-images-idx3-ubyte.gz`; for a language model, text"
    " (`.txt`, `.jsonl` or `.parquet`)"
)

TEXTS_HINT = "give text (`.txt`, `.jsonl` or `.parquet`), or token ids `input_ids` in a `.npz` or `.safetensors` file"


class DataSpec(Request, frozen=True, kw_only=True):
    """Data by its spec, see moeprune.data.datasets.

    split: of data that has splits; None for the default of the task. limit: samples to take at most.
    """

    spec: str
    split: Annotated[str | None, option("Split of data that has splits: train, calibration or test.")] = None
    sequence_length: Annotated[
        Positive | None,
        option("Tokens of each sequence that text is packed into.", show_default="the model's longest, at most 2048"),
    ] = None
    limit: Annotated[Positive | None, option("Take only so many samples, drawn with a fixed seed.")] = None

    def check(self) -> None:
        """Raise a MoepruneError if a split is given of data that has none, or whose spec names one."""
        if self.split is not None and split_spec(self.spec) != (self.spec, ""):
            hint = f"it picks a split of {', '.join(BUILT_IN)} or a folder in the format of MNIST"
            raise MoepruneError(f"`--split {self.split}` does not go with `{self.spec}`", hint)


class DataInfo(Result, frozen=True):
    """Data that a model ran on.

    fingerprint: SHA-256 of all inputs and labels as the model gets them.
    """

    spec: str
    samples: int
    fingerprint: str


def split_spec(spec: str) -> tuple[str, str] | None:
    """Return the built-in set or the folder in the format of MNIST that a spec names, and its split or an empty text.

    None if the spec names other data, which has no splits.
    """
    name, _, split = spec.partition(":")
    if name in BUILT_IN:
        return name, split
    if not os.path.exists(spec):  # noqa: PTH110 (Path.exists raises where a name is too long)
        folder, _, split = spec.rpartition(":")
    else:
        folder, split = spec, ""
    is_idx = folder and any(idx_images(folder, split) for split in IDX_SPLITS)
    return (folder, split) if is_idx else None


def idx_images(folder: str, split: str) -> Path | None:
    """Return the file of the images of a split in the format of MNIST, the plain one if there are two, or None."""
    start = os.path.join(folder, f"{IDX_SPLITS[split]}-images")  # noqa: PTH118
    paths = (f"{start}{dot}idx3-ubyte{suffix}" for suffix in ("", ".gz") for dot in "-.")
    return next((Path(path) for path in paths if os.path.isfile(path)), None)  # noqa: PTH113 (never raises)


def idx_labels(images: Path) -> Path | None:
    """Return the file of labels beside a file of images in the format of MNIST, by its name, or None."""
    parts = IDX_IMAGES.fullmatch(images.name)
    assert parts is not None
    plain = images.with_name(f"{parts[1]}labels{parts[2]}1-ubyte")
    return next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)
