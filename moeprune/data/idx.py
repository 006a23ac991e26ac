"""Files in the format of MNIST (idx), of images and of their labels, plain or compressed with gzip.

Two zero bytes, the type of the values, the number of dimensions, their sizes as big-endian uint32, and the values:
http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moeprune.data.arrays import converter
from moeprune.data.preprocessing import InputFormat
from moeprune.data.sources import Batches, Source
from moeprune.data.spec import idx_images, idx_labels
from moeprune.errors import MoepruneError
from moeprune.files.disk import refused, require_file

TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
AGAIN = "get the file again from where it came"
CHUNK = 2**20  # bytes that are decompressed at a time


def open_idx_split(folder: str, split: str, form: InputFormat) -> tuple[str, Source]:
    """Open a split of a folder in the format of MNIST; `calibration` is `train`.

    Returns:
        the spec of the split, such as `mnist:train`, and its samples.

    Raises:
        MoepruneError: there is no file of its images, or its files are damaged or do not fit the model.
    """
    split = "train" if split == "calibration" else split
    path = idx_images(folder, split)
    if path is None:
        prefix, other = ("train", "test") if split == "train" else ("t10k", "train")
        raise MoepruneError(
            f"no images of the split `{split}` in `{folder}`, expected `{prefix}-images-idx3-ubyte` or"
            f" `{prefix}-images-idx3-ubyte.gz`",
            f"add the file, or give the other split: `{folder}:{other}`",
        )
    return f"{folder}:{split}", replace(open_idx(path, form), better=f"{folder}:train" if split == "test" else "")


def open_idx(path: Path, form: InputFormat) -> Source:
    """Open a file of images (n,H,W) and the file of labels beside it, if there is one.

    Plain files are mapped, compressed ones are decompressed into memory, once. Raises a MoepruneError if a file is
    damaged or does not fit the other or the model.
    """
    images = _values(path, ("images", "height", "width"))
    to_inputs = converter(path, images.shape, form)
    labels_path = idx_labels(path) if form.classes else None
    labels = None if labels_path is None else _labels(labels_path, path, len(images), form.classes)

    def read(batches: Batches) -> Iterator[Tensor]:
        return (to_inputs(torch.from_numpy(images[list(indices)])) for indices in batches)

    files = [path] if labels_path is None else [path, labels_path]
    source = Source(len(images), labels, read, files, is_pixels=True)
    if path.name.startswith("t10k-"):
        return replace(source, split="test", better=str(path.with_name(path.name.replace("t10k", "train", 1))))
    return replace(source, split="train" if path.name.startswith("train-") else "")


def _labels(path: Path, images: Path, samples: int, classes: int) -> Tensor:
    labels = _values(path, ("labels",))
    if len(labels) != samples:
        message = f"`{path}` has {len(labels)} labels, expected {samples}, one for each image of `{images}`"
        raise MoepruneError(message, "give images and labels of the same split")
    if (outside := labels >= classes).any():
        place = int(outside.argmax())
        raise MoepruneError(
            f"label {place} of `{path}` is {labels[place]}, the model has {classes} classes (0 to {classes - 1})",
            "give the data that the model was trained for",
        )
    return torch.from_numpy(labels.astype(np.int64))


def _values(path: Path, axes: tuple[str, ...]) -> np.ndarray:
    """Return the uint8 values of an idx file with these axes, or raise a MoepruneError."""
    require_file(path, f"{axes[0]} in the format of MNIST")
    is_gzip, start = path.suffix == ".gz", 4 + 4 * len(axes)
    try:
        content = _decompressed(path, axes) if is_gzip else np.memmap(path, np.uint8, "r").view(np.ndarray)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise MoepruneError(f"`{path}` is not gzip, or is damaged ({error})", AGAIN) from None
    except OSError as error:
        raise refused("read", path, error) from None
    shape = _shape(path, content[:start].tobytes(), axes)
    size = start + math.prod(shape)
    if len(content) != size:
        found = f"{len(content)} bytes" if len(content) < size or not is_gzip else f"more than {size} bytes"
        values = f"{start} of the header and {'×'.join(map(str, shape))} of {axes[0]}"
        raise MoepruneError(f"`{path}` has {found}{' decompressed' * is_gzip}, expected {size}: {values}", AGAIN)
    return content[start:].reshape(shape)


def _decompressed(path: Path, axes: tuple[str, ...]) -> np.ndarray:
    """Return the bytes of a gzip file of values with these axes: at most one more than its header says."""
    start = 4 + 4 * len(axes)
    with gzip.open(path) as file:
        content = bytearray(file.read(start))
        most = start + math.prod(_shape(path, bytes(content), axes)) + 1
        while chunk := file.read(min(CHUNK, most - len(content))):
            content += chunk
    return np.frombuffer(content, np.uint8)


def _shape(path: Path, header: bytes, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the sizes that a header says, or raise a MoepruneError unless it is that of uint8 with these axes."""
    expected = bytes((0, 0, 0x08, len(axes)))
    if header[:2] == b"\0\0" and len(header) > 3 and header[2] != 0x08 and header[2] in TYPES:
        hint = "write the values as uint8 (type byte 0x08)"
        raise MoepruneError(f"`{path}` has values of type {TYPES[header[2]]}, expected uint8", hint)
    if header[:4] != expected:
        hint = "it is compressed: add `.gz` to its name" if header[:2] == b"\x1f\x8b" else AGAIN
        found = f"begins with the bytes {header[:4].hex(' ')}"
        message = f"`{path}` {found}, expected {expected.hex(' ')} (idx, uint8, {len(axes)} dimensions)"
        raise MoepruneError(message.replace("1 dimensions", "1 dimension"), hint)
    if len(header) < 4 + 4 * len(axes):
        raise MoepruneError(f"`{path}` ends in its header, after {len(header)} of {4 + 4 * len(axes)} bytes", AGAIN)
    return struct.unpack(f">{len(axes)}I", header[4:])
