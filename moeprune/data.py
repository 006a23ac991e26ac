"""Data sets as streams of batches: scikit-learn's digits, pairs of them, array files, image folders.

A spec is one of

    digits, digits:train, digits:calibration, digits:test     1,797 grey images of 8×8, 10 classes
    pairs, pairs:train, pairs:calibration, pairs:test         two of them side by side, 100 classes
    FILE.npz, FILE.safetensors                                arrays `inputs` and, for eval, `labels`
    DIRECTORY                                                 one folder of PNG/JPEG images a class

Pixels (the built-in sets, images, and arrays of uint8) are scaled to 0…1 and then normalised as the
checkpoint's preprocessing says. Arrays of floats are taken as they are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.preprocessing import InputFormat

SPLITS = ("train", "calibration", "test")
PAIRS_OF_SPLIT = 2000
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
SPECS_HINT = (
    "give `digits`, `pairs` (each with `:train`, `:calibration` or `:test`), a `.npz` or"
    " `.safetensors` file with `inputs` and `labels`, or a folder of class folders of images"
)

Batch = tuple[Tensor, Tensor | None]
"""Inputs (b,c,H,W) in float32 and labels (b,) in int64, or None where the data has none."""


@dataclass
class Dataset:
    """A data set that is read in batches and never as a whole.

    spec: as the user gave it, with its split. samples: how many there are.
    classes: of the model; labels lie below it.
    read: batches of the samples at these ascending indices.
    limit: samples to take at most.
    fingerprint: SHA-256 of all inputs and labels as the model gets them; known after a whole pass.
    """

    spec: str
    samples: int
    has_labels: bool
    classes: int
    read: Callable[[Sequence[int], int], Iterator[Batch]]
    limit: int | None = None
    fingerprint: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.samples == 0:
            raise MoepruneError(f"no samples in `{self.spec}`")
        self.available = self.samples
        if self.limit is not None:
            self.samples = min(self.limit, self.samples)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """One pass over the samples in a fixed order; with a limit, over as many evenly spaced ones.

        Raises:
            MoepruneError: NaN or infinite inputs, labels outside the classes, or what reading the
                file raises.
        """
        indices: Sequence[int] = range(self.available)
        if self.samples < self.available:
            indices = [i * self.available // self.samples for i in range(self.samples)]
        digest, seen = hashlib.sha256(), 0
        for inputs, labels in self.read(indices, batch_size):
            finite = inputs.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                bad = indices[seen + int(finite.logical_not().nonzero()[0])]
                raise MoepruneError(f"sample {bad} of `{self.spec}` has NaN or infinite values")
            if labels is not None and not (fits := (labels >= 0) & (labels < self.classes)).all():
                place = int(fits.logical_not().nonzero()[0])
                raise MoepruneError(
                    f"sample {indices[seen + place]} of `{self.spec}` has the label {int(labels[place])},"
                    f" the model has {self.classes} classes (0 to {self.classes - 1})"
                )
            for tensor in (inputs, labels):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().data)
            seen += len(inputs)
            yield inputs, labels
        self.fingerprint = digest.hexdigest()


def open_data(
    spec: str, input_format: InputFormat, split: str | None = None, limit: int | None = None
) -> Dataset:
    """Open the data set that a spec names (see the module's docstring).

    Args:
        split: the split of a built-in set whose spec names none; `test` if this is None too.
        limit: take as many evenly spaced samples.

    Raises:
        MoepruneError: an unknown spec or split, a file or folder that is missing, is not what it
            says, or does not fit the model.
    """
    name, _, spec_split = spec.partition(":")
    if name in BUILT_IN:
        split = spec_split or split or "test"
        if split not in SPLITS:
            raise MoepruneError(f"`{spec}`: unknown split `{split}`", f"splits are {', '.join(SPLITS)}")
        pixels, labels = BUILT_IN[name](split)
        return _from_tensors(f"{name}:{split}", pixels, labels, input_format, limit)
    path = Path(spec)
    if not path.exists():
        raise MoepruneError(f"no data `{spec}`", SPECS_HINT)
    if path.is_dir():
        return _from_folder(path, input_format, limit)
    if path.suffix == ".npz":
        return _from_npz(path, input_format, limit)
    if path.suffix == ".safetensors":
        return _from_safetensors(path, input_format, limit)
    raise MoepruneError(f"`{spec}` is no known kind of data", SPECS_HINT)


def chunks(indices: Sequence[int], batch_size: int) -> Iterator[Sequence[int]]:
    """The indices in order, batch_size at a time."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]


# --- built-in sets -----------------------------------------------------------------------------


def digits(split: str) -> tuple[Tensor, Tensor]:
    """One split of scikit-learn's digits: pixels (n,1,8,8) in 0…1 and labels (n,).

    Stratified and fixed: of every ten images of a class, in the order of the data set, five are for
    training, two for calibration and three for testing.

    Raises:
        MoepruneError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MoepruneError(
            "the data sets `digits` and `pairs` need scikit-learn", "pip install 'moeprune[demo]'"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32)[:, None] / 16
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    place_in_class = torch.empty_like(labels)
    for digit in range(10):
        place_in_class[labels == digit] = torch.arange(int((labels == digit).sum()))
    tenth = place_in_class % 10
    part = {"train": tenth < 5, "calibration": (tenth >= 5) & (tenth < 7), "test": tenth >= 7}[split]
    return images[part], labels[part]


def pairs(split: str) -> tuple[Tensor, Tensor]:
    """2,000 pairs of digits of one split side by side: pixels (2000,1,8,16), labels 10·left + right.

    Every class has 20 pairs; which images they are made of is drawn with a fixed seed.
    """
    images, labels = digits(split)
    by_digit = [(labels == digit).nonzero().flatten().tolist() for digit in range(10)]
    generator = random.Random(SPLITS.index(split))
    classes = [i % 100 for i in range(PAIRS_OF_SPLIT)]
    halves = []
    for shown in ([c // 10 for c in classes], [c % 10 for c in classes]):
        halves.append(images[[by_digit[s][int(generator.random() * len(by_digit[s]))] for s in shown]])
    return torch.cat(halves, dim=3), torch.tensor(classes)


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
        integers = not labels.is_floating_point() and not labels.is_complex()
        _check_labels(spec, tuple(labels.shape), shape[0], integers)
        labels = labels.to(torch.int64)

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for chunk in chunks(indices, batch_size):
            if isinstance(chunk, range):
                array = inputs[chunk[0] : chunk[-1] + 1]
            else:
                array = torch.cat([inputs[i : i + 1] for i in chunk])
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
            with archive.open("inputs.npy") as member:
                shape, dtype = _npy_header(member, spec)
            labels = None
            if "labels.npy" in names:
                with archive.open("labels.npy") as member:
                    labels_shape, labels_dtype = _npy_header(member, spec)
                    _check_labels(spec, labels_shape, shape[0], labels_dtype.kind in "iu")
                    raw = np.frombuffer(member.read(), labels_dtype)
                labels = torch.from_numpy(raw.astype(np.int64))
    except (BadZipFile, OSError, ValueError) as error:
        raise MoepruneError(f"`{spec}` is no readable .npz file ({error})") from None
    arrange = _arranger(spec, shape, input_format)
    sample_bytes = dtype.itemsize * int(np.prod(shape[1:]))

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        try:
            with ZipFile(path) as archive, archive.open("inputs.npy") as member:
                _npy_header(member, spec)
                start = member.tell()
                for chunk in chunks(indices, batch_size):
                    buffer = bytearray()
                    for index in chunk:
                        member.seek(start + index * sample_bytes)
                        buffer += member.read(sample_bytes)
                    array = np.frombuffer(buffer, dtype).reshape(len(chunk), *shape[1:])
                    inputs = torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False))
                    batch_labels = None if labels is None else labels[list(chunk)]
                    yield _to_inputs(spec, arrange(inputs), input_format).contiguous(), batch_labels
        except (BadZipFile, OSError, ValueError) as error:
            raise MoepruneError(f"`{spec}` is damaged ({error})") from None

    return Dataset(spec, shape[0], labels is not None, input_format.classes, read, limit)


def _npy_header(member: Any, spec: str) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise MoepruneError(f"`{spec}` has an array of .npy version {version}, expected 1.0 or 2.0")
    shape, fortran_order, dtype = read_header[version](member)
    if fortran_order and len(shape) > 1:
        raise MoepruneError(f"`{spec}` has an array in Fortran order", "save it with np.ascontiguousarray")
    if dtype.hasobject:
        raise MoepruneError(f"`{spec}` has an array of Python objects", "save it as numbers")
    return shape, dtype


# --- image folders -----------------------------------------------------------------------------


def _from_folder(path: Path, input_format: InputFormat, limit: int | None) -> Dataset:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MoepruneError("folders of images need Pillow", "pip install 'moeprune[images]'") from None
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise MoepruneError(
            f"no images in `{path}` ({len(classes)} class folders)",
            f"expected {path}/CLASS/*.png or *.jpg",
        )

    def read(indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        with ThreadPoolExecutor() as pool:
            for chunk in chunks(indices, batch_size):
                images = pool.map(lambda i: read_image(files[i][0], input_format), chunk)
                pixels = torch.stack(list(images))
                yield input_format.normalize(pixels), torch.tensor([files[i][1] for i in chunk])

    return Dataset(str(path), len(files), True, input_format.classes, read, limit)


def read_image(path: Path, input_format: InputFormat) -> Tensor:
    """An image, resized and cropped about its centre: pixels (c,H,W) in 0…1.

    Raises:
        MoepruneError: a file that is no image, or channels other than 1 (grey) or 3 (colour).
    """
    from PIL import Image

    channels, height, width = input_format.shape
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise MoepruneError(f"the model takes {channels} channels, images have 1 (grey) or 3 (colour)")
    try:
        with Image.open(path) as file:
            image = file.convert(modes[channels])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MoepruneError(f"`{path}` is no readable image ({error})", "repair or remove it") from None
    preprocessing = input_format.preprocessing
    shorter = min(image.size)
    factor = max(width / image.width, height / image.height)
    if preprocessing.resize is not None:
        factor = preprocessing.resize / shorter
    resized = (round(image.width * factor), round(image.height * factor))
    if resized[0] < width or resized[1] < height:
        raise MoepruneError(
            f"`{path}` is {resized[0]}×{resized[1]} after `resize` {preprocessing.resize},"
            f" smaller than the {width}×{height} that the model takes"
        )
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[preprocessing.interpolation.upper()])
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
