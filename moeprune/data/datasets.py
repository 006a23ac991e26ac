"""Data sets by their spec, read in batches and never as a whole.

A spec is one of

    digits, digits:train, digits:calibration, digits:test     1,797 grey images of 8×8, 10 classes
    pairs, pairs:train, pairs:calibration, pairs:test         two of them side by side, 100 classes
    FILE.npz, FILE.safetensors                                arrays `inputs` and, for eval, `labels`
    DIRECTORY                                                 one folder of images for each class, or
                                                              images without labels
    DIRECTORY, DIRECTORY:train, DIRECTORY:test                files in the format of MNIST
    train-images-idx3-ubyte, train-images-idx3-ubyte.gz, …    one of them, and its labels beside it

or, for a model that takes token ids,

    FILE.txt, FILE.jsonl, FILE.parquet                        documents, see moeprune.data.text
    FILE.npz, FILE.safetensors                                an array `input_ids` (n,s), without padding

Pixels (the built-in sets, images, files in the format of MNIST, and arrays of uint8) are scaled to 0…1 and then
normalised as the checkpoint's preprocessing says. Arrays of floats are used unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import random
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from moeprune.data.arrays import open_npz, open_safetensors
from moeprune.data.idx import open_idx, open_idx_split
from moeprune.data.images import open_folder
from moeprune.data.preprocessing import InputFormat
from moeprune.data.samples import Samples, open_samples
from moeprune.data.sources import Batches, Source, one_ahead
from moeprune.data.spec import BUILT_IN, IDX_IMAGES, SPECS_HINT, TEXTS_HINT, DataInfo, split_spec
from moeprune.data.text import KINDS, open_text
from moeprune.data.tokens import AnyFormat, TokenFormat
from moeprune.errors import MoepruneError
from moeprune.files.disk import require_file, version_of

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor | None]  # inputs as in Source, and labels (b,) in int64, or None
SPLITS = {"train": (0, 5), "calibration": (5, 7), "test": (7, 10)}
"""The places from and to, of every ten images of a class in the order of the data set."""
ARRAYS = {".npz": open_npz, ".safetensors": open_safetensors}


@dataclass
class Dataset:
    """Samples of a source.

    spec: as the user gave it, with its split. classes: of the model; labels lie below it. indices: of the samples in
    the source, ascending. fingerprint: as in DataInfo; None before a whole pass.
    """

    spec: str
    source: Source
    classes: int
    indices: Sequence[int]
    fingerprint: str | None = field(default=None, init=False, compare=False)
    _hashed: list[Any] | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.indices:
            raise MoepruneError(f"no samples in `{self.spec}`")

    @property
    def samples(self) -> int:
        """The number of samples."""
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        """True if batches have labels."""
        return self.source.labels is not None

    @property
    def info(self) -> DataInfo:
        """Facts for files and reports; known after a whole pass."""
        assert self.fingerprint is not None
        return DataInfo(spec=self.spec, samples=self.samples, fingerprint=self.fingerprint)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, in data of a language model."""
        [first] = self.source.read([self.indices[:1]])
        return self.samples * first.shape[1]

    def sample(self, count: int) -> Dataset:
        """Return a data set of at most this many of these samples, drawn with a fixed seed."""
        if count < 1:
            raise MoepruneError(f"cannot take {count} samples of `{self.spec}`", "take at least 1")
        if count >= self.samples:
            return self
        # Not evenly spaced: data whose classes alternate would lose some of them.
        return replace(self, indices=sorted(random.Random(0).sample(self.indices, count)))

    def part(self, places: Sequence[int], name: str) -> Dataset:
        """Return the samples at these ascending places as a data set; name: appended to its spec."""
        return replace(self, spec=f"{self.spec} ({name})", indices=[self.indices[place] for place in places])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Iterate over the samples in a fixed order, reading one batch ahead in a thread.

        The first whole pass, and those after the files have changed, hash the samples in that thread; they raise a
        MoepruneError for NaN or infinite inputs and for labels outside the classes.
        """
        versions = [version_of(path) for path in self.source.files]
        is_new = self.fingerprint is None or versions != self._hashed
        digests = hashlib.sha256(), hashlib.sha256()  # apart, so that the batch size leaves no trace
        batches = self._read(batch_size, digests if is_new else None)
        with contextlib.closing(batches), ThreadPoolExecutor(1) as thread:
            for coming in one_ahead(thread.submit(next, batches, None) for _ in itertools.count()):
                if (batch := coming.result()) is None:
                    break
                yield batch
        if is_new:
            both = b"".join(digest.digest() for digest in digests)
            self.fingerprint, self._hashed = hashlib.sha256(both).hexdigest(), versions

    def read_fingerprint(self, batch_size: int = 256) -> str:
        """Return the fingerprint after a pass over the samples."""
        for _ in self.batches(batch_size):
            pass
        assert self.fingerprint is not None
        return self.fingerprint

    def _read(self, batch_size: int, digests: Sequence[hashlib._Hash] | None) -> Generator[Batch]:
        """Yield the batches; with digests, check them and add their inputs and labels."""
        parts = [self.indices[place : place + batch_size] for place in range(0, self.samples, batch_size)]
        for part, inputs in zip(parts, self.source.read(parts), strict=True):
            labels = None if self.source.labels is None else self.source.labels[list(part)]
            if digests is not None:
                self._check(part, inputs, labels)
                for digest, tensor in zip(digests, (inputs, labels), strict=True):
                    if tensor is not None:
                        digest.update(tensor.contiguous().numpy().data)
            yield inputs, labels

    def _check(self, part: Sequence[int], inputs: Tensor, labels: Tensor | None) -> None:
        finite = np.isfinite(inputs.numpy()).reshape(len(inputs), -1).all(axis=1)
        if not finite.all():
            raise MoepruneError(f"sample {part[int(finite.argmin())]} of `{self.spec}` has NaN or infinite values")
        if labels is not None and not (fits := (labels >= 0) & (labels < self.classes)).all():
            bad = int(fits.logical_not().nonzero()[0])
            label = f"sample {part[bad]} of `{self.spec}` has the label {int(labels[bad])}"
            raise MoepruneError(f"{label}, the model has {self.classes} classes (0 to {self.classes - 1})")


Data: TypeAlias = "Dataset | str | os.PathLike[str] | Samples"
"""A data set, its spec, or the samples themselves."""


def open_data(
    spec: Data,
    input_format: AnyFormat,
    split: str | None = None,
    limit: int | None = None,
    sequence_length: int | None = None,
    by: str | None = None,
) -> Dataset:
    """Open the data set that a spec names, or raise a MoepruneError if it is unknown, damaged or does not fit.

    Args:
        spec: as at the top of this module, or samples: see moeprune.data.samples.
        split: the split of data that has splits, where the spec names none; `test` if this is None too.
        limit: take at most this many samples, drawn with a fixed seed.
        sequence_length: tokens of each sequence that text is packed into; None: the model's longest, at most 2048.
        by: the field of documents that names the group of each.
    """
    if isinstance(spec, Dataset):
        return spec if limit is None else spec.sample(limit)
    input_format = input_format.prepared(sequence_length, by)
    if not isinstance(spec, str | os.PathLike):
        spec, source = open_samples(spec, input_format)
        _warn_of_guess(spec, input_format, source.is_pixels)
        data = Dataset(spec, source, input_format.classes, range(source.samples))
        return data if limit is None else data.sample(limit)
    spec = os.fspath(spec)
    hint = f"splits are {', '.join(SPLITS)}"
    if split is not None and split not in SPLITS:
        raise MoepruneError(f"`--split {split}` is unknown", hint)
    if isinstance(input_format, TokenFormat):
        source = _open_tokens(spec, input_format)
    elif (named := split_spec(spec)) is None:
        source = _open_path(spec, input_format)
    else:
        name, own_split = named
        split = own_split or split or "test"
        if split not in SPLITS:
            raise MoepruneError(f"`{spec}`: unknown split `{split}`", hint)
        open_split = _open_built_in if name in BUILT_IN else open_idx_split
        spec, source = open_split(name, split, input_format)
    _warn_of_guess(spec, input_format, source.is_pixels)
    data = Dataset(spec, source, input_format.classes, range(source.samples))
    return data if limit is None else data.sample(limit)


def _open_built_in(name: str, split: str, form: InputFormat) -> tuple[str, Source]:
    """Return the spec of a split of a built-in set, and its samples."""
    spec = f"{name}:{split}"
    pixels, labels = {"digits": digits, "pairs": pairs}[name](split)
    if tuple(pixels.shape[1:]) != form.shape:
        raise form.misfit(spec, tuple(pixels.shape))
    source = from_tensors(spec, form.normalize(pixels), labels, form.classes).source
    better = "" if split == "calibration" else f"{name}:calibration"
    return spec, replace(source, is_pixels=True, split=split, better=better)


def _warn_of_guess(spec: str, input_format: AnyFormat, is_pixels: bool) -> None:
    if is_pixels and isinstance(input_format, InputFormat) and not input_format.preprocessing.states_normalisation:
        logger.warning(
            f"pixels of `{spec}` are not normalised, as the checkpoint does not state its preprocessing: give that of"
            " its training, such as `--preprocess mean=0.5 --preprocess std=0.5`, or `mean=0` if there was none"
        )


def from_tensors(spec: str, inputs: Tensor, labels: Tensor | None, classes: int) -> Dataset:
    """Return a data set in memory, of inputs (n,c,H,W) as the model takes them and labels (n,)."""

    def read(batches: Batches) -> Iterator[Tensor]:
        return (inputs[list(indices)] for indices in batches)

    return Dataset(spec, Source(len(inputs), labels if classes else None, read), classes, range(len(inputs)))


def _open_path(spec: str, input_format: InputFormat) -> Source:
    path = _existing(spec, SPECS_HINT)
    if path.is_dir():
        return open_folder(path, input_format)
    require_file(path, "an array file or a folder of images")
    if IDX_IMAGES.fullmatch(path.name):
        return open_idx(path, input_format)
    if path.suffix.lower() not in ARRAYS:
        raise MoepruneError(f"`{spec}` is not a known kind of data", SPECS_HINT)
    return ARRAYS[path.suffix.lower()](path, input_format)


def _open_tokens(spec: str, form: TokenFormat) -> Source:
    path = _existing(spec, TEXTS_HINT)
    require_file(path, "a file of text or token ids")
    if (kind := path.suffix.lower()) not in ARRAYS:
        if kind not in (".txt", *KINDS):
            raise MoepruneError(f"`{spec}` is not a known kind of text", TEXTS_HINT)
        return open_text(path, form)
    source = ARRAYS[kind](path, form)
    parts = (range(at, min(at + 256, source.samples)) for at in range(0, source.samples, 256))
    for _ in source.read(parts):  # which raises an error for ids outside the vocabulary, before any pass
        pass
    return source


def _existing(spec: str, hint: str) -> Path:
    if not spec or not os.path.exists(spec):  # noqa: PTH110 (Path.exists raises where a name is too long)
        raise MoepruneError(f"no data `{spec}`", hint)
    return Path(spec)


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return one split of scikit-learn's digits, stratified and fixed: pixels (n,1,8,8) in 0…1 and labels (n,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        hint = "install it: `pip install scikit-learn`"
        raise MoepruneError("the data sets `digits` and `pairs` need scikit-learn", hint) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    place_in_class = (labels == labels[:, None]).tril(-1).sum(1)
    start, end = SPLITS[split]
    part = (place_in_class % 10 >= start) & (place_in_class % 10 < end)
    return images[part], labels[part]


def pairs(split: str) -> tuple[Tensor, Tensor]:
    """2,000 pairs of digits of one split side by side: pixels (2000,1,8,16), labels 10·left + right.

    Every class has 20 pairs; which images they are made of is drawn with a fixed seed.
    """
    images, labels = digits(split)
    by_digit = [images[labels == digit] for digit in range(10)]
    generator = random.Random(list(SPLITS).index(split))

    def draw(digits: Tensor) -> Tensor:
        shown = (by_digit[digit] for digit in digits.tolist())
        return torch.stack([each[int(generator.random() * len(each))] for each in shown])

    classes = torch.arange(2000) % 100
    return torch.cat([draw(classes // 10), draw(classes % 10)], dim=3), classes
