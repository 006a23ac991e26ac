"""Array files `.npz` and `.safetensors` with `inputs` and, optionally, `labels`; read batch by batch."""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune.data.sources import Batches, Source
from moeprune.data.tokens import TOKENIZER_HINT, AnyFormat, TokenFormat
from moeprune.errors import MoepruneError

DAMAGES = (
    BadZipFile, EOFError, LZMAError, OSError, RuntimeError, SafetensorError, SyntaxError, TokenError, TypeError,
    ValueError, zlib.error,
)  # fmt: skip
"""Errors of libraries for damaged, encrypted or unusual arrays."""


def open_safetensors(path: Path, input_format: AnyFormat) -> Source:
    """Open the arrays of a safetensors file, or raise a MoepruneError if they do not fit the model."""
    with _damage_as_error(f"`{path}` is not a safetensors file"):
        file = safe_open(path, framework="pt")
    names = set(file.keys())
    _require_inputs(path, names, input_format)
    inputs = file.get_slice(input_format.array)
    shape = tuple(inputs.get_shape())
    to_inputs = converter(path, shape, input_format)
    labels = None
    if "labels" in names and input_format.classes:
        labels = checked_labels(path, file.get_tensor("labels"), shape[0])

    def read(batches: Batches) -> Iterator[Tensor]:
        for indices in batches:
            yield to_inputs(torch.cat([inputs[index : index + 1] for index in indices]))

    return Source(shape[0], labels, read, [path], inputs.get_dtype() == "U8")


def open_npz(path: Path, input_format: AnyFormat) -> Source:
    """Open the arrays of a `.npz` file, compressed or not, or raise a MoepruneError if they do not fit the model."""
    labels = None
    with _damage_as_error(f"`{path}` is not a readable .npz file"), ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        _require_inputs(path, names, input_format)
        shape, dtype, start = _npy_header(archive, input_format.array, path)
        to_inputs = converter(path, shape, input_format)
        if "labels" in names and input_format.classes:
            labels_shape, labels_dtype, labels_start = _npy_header(archive, "labels", path)
            array = np.frombuffer(archive.read("labels.npy"), labels_dtype, offset=labels_start)
            native = array.reshape(labels_shape).astype(labels_dtype.newbyteorder("="))
            labels = checked_labels(path, torch.from_numpy(native), shape[0])
    member_name, sample_bytes = f"{input_format.array}.npy", dtype.itemsize * math.prod(shape[1:])

    def read(batches: Batches) -> Iterator[Tensor]:
        with _damage_as_error(f"`{path}` is damaged"), ZipFile(path) as archive, archive.open(member_name) as member:
            for indices in batches:
                buffer = bytearray()
                for index in indices:
                    member.seek(start + index * sample_bytes)
                    buffer += member.read(sample_bytes)
                array = np.frombuffer(buffer, dtype).reshape(len(indices), *shape[1:])
                yield to_inputs(torch.from_numpy(array.astype(dtype.newbyteorder("="), copy=False)))

    return Source(shape[0], labels, read, [path], dtype == np.uint8)


def _npy_header(archive: ZipFile, name: str, path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Return the shape and type of an array in an archive, and where its values start in its member."""
    with _damage_as_error(f"`{name}` of `{path}` is not readable"), archive.open(f"{name}.npy") as member:
        formats = np.lib.format
        is_first = formats.read_magic(member) == (1, 0)
        read_header = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))  # fails unless these are numbers
        start = member.tell()
    if fortran_order and len(shape) > 1:
        raise MoepruneError(f"`{name}` of `{path}` is in Fortran order", "save it with np.ascontiguousarray")
    found = archive.getinfo(f"{name}.npy").file_size - start
    if min(shape, default=0) < 0 or found != dtype.itemsize * math.prod(shape):
        expected = f"expected those of {list(shape)} values of type {dtype}"
        raise MoepruneError(f"`{name}` of `{path}` has {found} bytes, {expected}", "write the file again")
    return shape, dtype, start


@contextlib.contextmanager
def _damage_as_error(message: str) -> Iterator[None]:
    try:
        yield
    except DAMAGES as error:
        raise MoepruneError(f"{message} ({error})") from None


def _require_inputs(path: Path, names: Iterable[str], form: AnyFormat) -> None:
    if form.array not in names:
        of_labels = "" if isinstance(form, TokenFormat) else ", and that of labels `labels`"
        hint = f"name the array of inputs `{form.array}`{of_labels}"
        raise MoepruneError(f"no array `{form.array}` in `{path}`, found {sorted(names)}", hint)


def checked_labels(path: Path | str, labels: Tensor, samples: int) -> Tensor:
    """Return the labels as int64, or raise a MoepruneError unless they are one integer for each sample."""
    if tuple(labels.shape) != (samples,):
        raise MoepruneError(f"`labels` of `{path}` have the shape {list(labels.shape)}, expected [{samples}]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise MoepruneError(f"`labels` of `{path}` are {labels.dtype}, expected integers")
    if labels.dtype == torch.uint64 and labels.numpy().max(initial=0) > torch.iinfo(torch.int64).max:
        raise MoepruneError(f"`labels` of `{path}` go up to {labels.numpy().max()}")
    return labels.to(torch.int64)


def converter(path: Path | str, shape: tuple[int, ...], form: AnyFormat) -> Callable[[Tensor], Tensor]:
    """Return the function that turns arrays (n,c,H,W), (n,H,W,c) or, for one channel, (n,H,W) into float32 inputs.

    For a model that takes token ids, it turns arrays (n,s) of any integers into int64.
    """
    if isinstance(form, TokenFormat):
        return _of_ids(path, shape, form)
    channels, height, width = form.shape
    grey = (height, width) if channels == 1 else form.shape
    if shape[1:] not in {form.shape, (height, width, channels), grey}:
        raise form.misfit(str(path), shape)
    is_channels_last = shape[1:] != form.shape and len(shape) == 4

    def to_inputs(array: Tensor) -> Tensor:
        array = array.permute(0, 3, 1, 2) if is_channels_last else array.reshape(-1, *form.shape)
        if array.dtype == torch.uint8:
            return form.normalize(array.to(torch.float32).div_(255)).contiguous()
        if array.is_floating_point():
            return array.to(torch.float32).contiguous()
        raise MoepruneError(f"inputs of `{path}` are {array.dtype}, expected uint8 pixels or floats")

    return to_inputs


def _of_ids(path: Path | str, shape: tuple[int, ...], form: TokenFormat) -> Callable[[Tensor], Tensor]:
    if form.by is not None or form.sequence_length is not None:
        option = "--sequence-length" if form.by is None else "--by"
        raise MoepruneError(f"`{option}` does not go with the token ids of `{path}`", "give a file of text")
    if len(shape) != 2 or not 2 <= shape[1] <= form.longest:
        raise form.misfit(str(path), shape)

    def to_ids(array: Tensor) -> Tensor:
        if array.is_floating_point() or array.is_complex() or array.dtype == torch.bool:
            raise MoepruneError(f"`input_ids` of `{path}` are {array.dtype}, expected integers")
        ids = array.to(torch.int64)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < 0 or high >= form.vocabulary:
            expected = f"expected 0 to {form.vocabulary - 1}: the model's vocabulary has {form.vocabulary} tokens"
            raise MoepruneError(f"`input_ids` of `{path}` go from {low} to {high}, {expected}", TOKENIZER_HINT)
        return ids

    return to_ids
