"""Data sets as streams of batches: scikit-learn's digits, pairs of them, array files, image folders.

A spec is one of

    digits, digits:train, digits:calibration, digits:test     1,797 grey images of 8×8, 10 classes
    pairs, pairs:train, pairs:calibration, pairs:test         two of them side by side, 100 classes
    FILE.npz, FILE.safetensors                                arrays `inputs` and, for eval, `labels`
    DIRECTORY                                                 one folder of PNG/JPEG images a class, or
                                                              images without labels

Pixels (the built-in sets, images, and arrays of uint8) are scaled to 0…1 and then normalised as the
checkpoint's preprocessing says. Arrays of floats are taken as they are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any, TypeVar
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune.data.digits import SPLITS, digits, pairs
from moeprune.data.images import read_image
from moeprune.data.preprocessing import InputFormat
from moeprune.errors import MoepruneError
from moeprune.files.header import require_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SPECS_HINT = (
    "give `digits`, `pairs` (each with `:train`, `:calibration` or `:test`), a `.npz` or"
    " `.safetensors` file with `inputs` and `labels`, or a folder of class folders of images"
)

DAMAGES = (BadZipFile, EOFError, NotImplementedError, OSError, ValueError, zlib.error)
"""What reading a damaged or unusual .npz raises."""
T = TypeVar("T")
Batch = tuple[Tensor, Tensor | None]
"""Inputs (b,c,H,W) in float32 and labels (b,) in int64, or None where the data has none."""


@dataclass
class Dataset:
    """A data set that is read in batches and never as a whole.

    spec: as the user gave it, with its split. samples: how many there are.
    classes: of the model; labels lie below it. 0 where the model has no head: labels are not looked at.
    read: batches of the samples at these ascending indices.
    limit: samples to take at most.
    members: the samples that there are, ascending; None: all that can be read.
    fingerprint: SHA-256 of all inputs and labels as the model gets them; known after a whole pass.
    """

    spec: str
    samples: int
    has_labels: bool
    classes: int
    read: Callable[[Sequence[int], int], Iterator[Batch]]
    limit: int | None = None
    members: Sequence[int] | None = None
    fingerprint: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.samples == 0:
            raise MoepruneError(f"no samples in `{self.spec}`")
        self.available = self.samples
        if self.limit is not None:
            self.samples = min(self.limit, self.samples)

    def to_json(self) -> dict[str, Any]:
        """What a file or report says of the data, as JSON values."""
        return {"spec": self.spec, "samples": self.samples, "fingerprint": self.fingerprint}

    def few(self, count: int) -> Dataset:
        """As many of the samples, if there are so many, drawn with a fixed seed."""
        return replace(self, samples=self.available, limit=min(count, self.samples))

    @property
    def indices(self) -> Sequence[int]:
        """The samples that a pass gives, ascending: all of them, or as many as the limit, drawn."""
        indices: Sequence[int] = range(self.available) if self.members is None else self.members
        if self.samples < self.available:
            # Not evenly spaced: a set whose classes take turns would lose some of them.
            indices = sorted(random.Random(0).sample(indices, self.samples))
        return indices

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """One pass over the samples in a fixed order; with a limit, over as many drawn with a fixed seed.

        Raises:
            MoepruneError: NaN or infinite inputs, labels outside the classes, or what reading the
                file raises.
        """
        indices = self.indices
        digests, seen = (hashlib.sha256(), hashlib.sha256()), 0
        for inputs, labels in self.read(indices, batch_size):
            finite = inputs.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                bad = indices[seen + int(finite.logical_not().nonzero()[0])]
                raise MoepruneError(f"sample {bad} of `{self.spec}` has NaN or infinite values")
            if (
                labels is not None
                and self.classes
                and not (fits := (labels >= 0) & (labels < self.classes)).all()
            ):
                place = int(fits.logical_not().nonzero()[0])
                raise MoepruneError(
                    f"sample {indices[seen + place]} of `{self.spec}` has the label {int(labels[place])},"
                    f" the model has {self.classes} classes (0 to {self.classes - 1})"
                )
            for digest, tensor in zip(digests, (inputs, labels), strict=True):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().data)
            seen += len(inputs)
            yield inputs, labels
        both = b"".join(digest.digest() for digest in digests)  # apart, so that batches leave no trace
        self.fingerprint = hashlib.sha256(both).hexdigest()


def subset(data: Dataset, members: Sequence[int], name: str) -> Dataset:
    """Some samples of a data set, as one of its own.

    Args:
        members: their places among the samples of `data` that a pass over it gives, ascending.
        name: what messages call the part.
    """
    indices = data.indices
    chosen = [indices[place] for place in members]
    spec = f"{data.spec} ({name})"
    return replace(data, spec=spec, samples=len(chosen), limit=None, members=chosen, fingerprint=None)


def open_data(
    spec: str, input_format: InputFormat, split: str | None = None, limit: int | None = None
) -> Dataset:
    """Open the data set that a spec names (see the module's docstring).

    Args:
        split: the split of a built-in set whose spec names none; `test` if this is None too.
        limit: take as many samples, drawn with a fixed seed.

    Raises:
        MoepruneError: an unknown spec or split, a file or folder that is missing, is not what it
            says, or does not fit the model.
    """
    name, _, spec_split = spec.partition(":")
    if split is not None and split not in SPLITS:
        raise MoepruneError(f"`--split {split}` is unknown", f"splits are {', '.join(SPLITS)}")
    if name in BUILT_IN:
        split = spec_split or split or "test"
        if split not in SPLITS:
            raise MoepruneError(f"`{spec}`: unknown split `{split}`", f"splits are {', '.join(SPLITS)}")
        pixels, labels = BUILT_IN[name](split)
        return _from_tensors(f"{name}:{split}", pixels, labels, input_format, limit)
    path = Path(spec)
    if not spec or not os.path.exists(path):  # noqa: PTH110 (Path.exists raises where a name is too long)
        raise MoepruneError(f"no data `{spec}`", SPECS_HINT)
    if path.is_dir():
        return _from_folder(path, input_format, limit)
    require_file(path, "an array file or a folder of images")
    if path.suffix == ".npz":
        return _from_npz(path, input_format, limit)
    if path.suffix == ".safetensors":
        return _from_safetensors(path, input_format, limit)
    raise MoepruneError(f"`{spec}` is no known kind of data", SPECS_HINT)


def chunks(indices: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """The indices in order, batch_size at a time."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]


def runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending indices as runs of neighbours: the first of each and how many there are.

    >>> list(runs([0, 1, 2, 7, 9, 10]))
    [(0, 3), (7, 1), (9, 2)]
    """
    for _, group in itertools.groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        yield members[0], len(members)


# --- built-in sets -----------------------------------------------------------------------------

BUILT_IN = {"digits": digits, "pairs": pairs}


def _from_tensors(
    spec: str, pixels: Tensor, labels: Tensor, input_format: InputFormat, limit: int | None
) -> Dataset:
    arrange = _arranger(spec, tuple(pixels.shape), input_format)

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for chunk in chunks(indices, batch_size):
            yield input_format.normalize(arrange(pixels[list(chunk)])), labels[list(chunk)]

    return Dataset(spec, len(pixels), True, input_format.classes, read, limit)


# --- arrays ------------------------------------------------------------------------------------


def _arranger(spec: str, shape: tuple[int, ...], input_format: InputFormat) -> Callable[[Tensor], Tensor]:
    """The function that brings arrays of this shape to (n,c,H,W)."""
    channels, height, width = input_format.shape
    if shape[1:] == (channels, height, width):
        return lambda x: x
    if shape[1:] == (height, width, channels):
        return lambda x: x.permute(0, 3, 1, 2)
    if channels == 1 and shape[1:] == (height, width):
        return lambda x: x[:, None]
    raise MoepruneError(
        f"inputs of `{spec}` have the shape {list(shape)},"
        f" the model takes [n, {channels}, {height}, {width}]",
        "give data of the size and the channels that `moeprune inspect` shows",
    )


def _to_inputs(spec: str, array: Tensor, input_format: InputFormat) -> Tensor:
    if array.dtype == torch.uint8:
        return input_format.normalize(array.to(torch.float32) / 255)
    if array.is_floating_point():
        return array.to(torch.float32)
    raise MoepruneError(f"inputs of `{spec}` are {array.dtype}, expected uint8 pixels or floats")


def _check_labels(spec: str, shape: tuple[int, ...], samples: int, integers: bool) -> None:
    if shape != (samples,):
        raise MoepruneError(f"`labels` of `{spec}` have the shape {list(shape)}, expected [{samples}]")
    if not integers:
        raise MoepruneError(f"`labels` of `{spec}` are no integers", "give the index of each sample's class")


def _from_safetensors(path: Path, input_format: InputFormat, limit: int | None) -> Dataset:
    spec = str(path)
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MoepruneError(f"`{spec}` is no safetensors file ({error})") from None
    names = set(file.keys())
    if "inputs" not in names:
        raise MoepruneError(f"no `inputs` in `{spec}`, found {sorted(names)}", SPECS_HINT)
    inputs = file.get_slice("inputs")
    shape = tuple(inputs.get_shape())
    arrange = _arranger(spec, shape, input_format)
    labels = file.get_tensor("labels") if "labels" in names else None
    if labels is not None:
        integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        _check_labels(spec, tuple(labels.shape), shape[0], integers)
        labels = labels.to(torch.int64)

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for chunk in chunks(indices, batch_size):
            array = torch.cat([inputs[first : first + count] for first, count in runs(chunk)])
            batch_labels = None if labels is None else labels[list(chunk)]
            yield _to_inputs(spec, arrange(array), input_format).contiguous(), batch_labels

    return Dataset(spec, shape[0], labels is not None, input_format.classes, read, limit)


def _from_npz(path: Path, input_format: InputFormat, limit: int | None) -> Dataset:
    spec = str(path)
    try:
        with ZipFile(path) as archive:
            names = set(archive.namelist())
            if "inputs.npy" not in names:
                raise MoepruneError(f"no `inputs` in `{spec}`, found {sorted(names)}", SPECS_HINT)
            shape, dtype, start = _npy_header(archive, "inputs", spec)
            arrange = _arranger(spec, shape, input_format)
            labels = None
            if "labels.npy" in names:
                labels_shape, labels_dtype, labels_start = _npy_header(archive, "labels", spec)
                _check_labels(spec, labels_shape, shape[0], labels_dtype.kind in "iu")
                raw = np.frombuffer(archive.read("labels.npy"), labels_dtype, offset=labels_start)
                if raw.size and raw.max() > np.iinfo(np.int64).max:
                    raise MoepruneError(f"`labels` of `{spec}` go up to {raw.max()}")
                labels = torch.from_numpy(raw.astype(np.int64))
    except DAMAGES as error:
        raise MoepruneError(f"`{spec}` is no readable .npz file ({error})") from None
    sample_bytes = dtype.itemsize * math.prod(shape[1:])

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        try:
            with ZipFile(path) as archive, archive.open("inputs.npy") as member:
                for chunk in chunks(indices, batch_size):
                    buffer = bytearray()
                    for first, count in runs(chunk):
                        member.seek(start + first * sample_bytes)
                        buffer += member.read(count * sample_bytes)
                    array = np.frombuffer(buffer, dtype).reshape(len(chunk), *shape[1:])
                    inputs = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
                    batch_labels = None if labels is None else labels[list(chunk)]
                    yield _to_inputs(spec, arrange(inputs), input_format).contiguous(), batch_labels
        except DAMAGES as error:
            raise MoepruneError(f"`{spec}` is damaged ({error})") from None

    return Dataset(spec, shape[0], labels is not None, input_format.classes, read, limit)


def _npy_header(archive: ZipFile, name: str, spec: str) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array in an archive, and where its values start in its member."""
    info = archive.getinfo(f"{name}.npy")
    if info.flag_bits & 1 or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise MoepruneError(f"`{spec}` is encrypted, or compressed as np.savez does not", "write it again")
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read_header:
            raise MoepruneError(f"`{spec}` has an array of .npy version {version}, expected 1.0 or 2.0")
        try:
            shape, fortran_order, dtype = read_header[version](member)
        except (SyntaxError, TokenError, TypeError, RecursionError) as error:
            raise MoepruneError(f"`{spec}`: the header of `{name}` is damaged ({error})") from None
        start = member.tell()
    if fortran_order and len(shape) > 1:
        raise MoepruneError(f"`{spec}` has an array in Fortran order", "save it with np.ascontiguousarray")
    if dtype.hasobject:
        raise MoepruneError(f"`{spec}` has an array of Python objects", "save it as numbers")
    try:
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
    except TypeError:
        raise MoepruneError(f"`inputs` or `labels` of `{spec}` are {dtype}", "save it as numbers") from None
    found = info.file_size - start
    if min(shape, default=0) < 0 or found != dtype.itemsize * math.prod(shape):
        raise MoepruneError(
            f"`{name}` of `{spec}` has {found} bytes, which are no {list(shape)} of {dtype}", "write it again"
        )
    return shape, dtype, start


# --- image folders -----------------------------------------------------------------------------


def _from_folder(path: Path, input_format: InputFormat, limit: int | None) -> Dataset:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MoepruneError(
            "folders of images need Pillow", "install it, or moeprune's extra `images`"
        ) from None
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")
    if classes and len(classes) != input_format.classes and input_format.classes:
        raise MoepruneError(
            f"`{path}` has {len(classes)} class folders, the model {input_format.classes} classes:"
            " the labels would be wrong",
            "make a folder for every class (it may be empty), or put unlabelled images into one flat folder",
        )
    files = [
        (file, label)
        for label, folder in enumerate(path / name for name in classes or ["."])
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."
    ]
    if not files:
        raise MoepruneError(
            f"no images in `{path}` ({len(classes)} class folders)",
            f"expected {path}/CLASS/*.png or *.jpg",
        )

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        with ThreadPoolExecutor() as pool:

            def start(chunk: Sequence[int]) -> tuple[Sequence[int], list[Future[Tensor]]]:
                return chunk, [pool.submit(read_image, files[i][0], input_format) for i in chunk]

            # The next batch is decoded while the model runs on this one.
            for chunk, images in _one_ahead(start(chunk) for chunk in chunks(indices, batch_size)):
                pixels = torch.stack([image.result() for image in images])
                labels = torch.tensor([files[i][1] for i in chunk]) if classes else None
                yield input_format.normalize(pixels), labels

    return Dataset(str(path), len(files), bool(classes), input_format.classes, read, limit)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each handed out only when the next has been asked for."""
    held = list(itertools.islice(items, 1))
    for item in items:
        held.append(item)
        yield held.pop(0)
    yield from held
