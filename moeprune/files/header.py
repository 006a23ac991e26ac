"""The header of a safetensors file: which tensors it has, without their values and without torch.

The library `safetensors` imports numpy or torch whenever it opens a file, this reader neither. Like the
library it checks that the tensors cover the file exactly, so that a truncated file is found out.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moeprune.errors import MoepruneError

METADATA_KEY = "moeprune"
MAX_DEPTH = 100
"""Levels of the metadata's JSON; deeper ones are a mistake."""
MAX_LENGTH = 100_000_000
"""Bytes of the longest header, as in the library."""

DTYPES = {
    "BOOL": ("torch.bool", 8),
    "F4": ("torch.float4_e2m1fn_x2", 4),
    "F6_E2M3": ("F6_E2M3", 6),  # not in torch
    "F6_E3M2": ("F6_E3M2", 6),
    "F8_E4M3": ("torch.float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("torch.float8_e4m3fnuz", 8),
    "F8_E5M2": ("torch.float8_e5m2", 8),
    "F8_E5M2FNUZ": ("torch.float8_e5m2fnuz", 8),
    "F8_E8M0": ("torch.float8_e8m0fnu", 8),
    "F16": ("torch.float16", 16),
    "BF16": ("torch.bfloat16", 16),
    "F32": ("torch.float32", 32),
    "F64": ("torch.float64", 64),
    "C64": ("torch.complex64", 64),
    "I8": ("torch.int8", 8),
    "I16": ("torch.int16", 16),
    "I32": ("torch.int32", 32),
    "I64": ("torch.int64", 64),
    "U8": ("torch.uint8", 8),
    "U16": ("torch.uint16", 16),
    "U32": ("torch.uint32", 32),
    "U64": ("torch.uint64", 64),
}
"""The name in torch and the bits of an element, by the name in a file."""


FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values: dtype is the name in torch, nbytes the size of all elements."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Args:
        path: of the file.
        tensors: by name.
        offsets: where the bytes of each tensor start in the file.
        metadata: the JSON of the key `moeprune`, if there is one.
        version: inode, size and time of the last change, as they were when the header was read.
        digests: the SHA-256 of each tensor's bytes, once moeprune.files.checkpoint.scan has found them.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    metadata: dict[str, Any] | None
    version: tuple[int, int, int] | None
    digests: dict[str, str] = field(default_factory=dict, compare=False)


def read_header(path: str | Path | Header) -> Header:
    """Read the header of a safetensors file; one that was read already is returned as it is.

    Raises:
        MoepruneError: the file is missing, empty, truncated, or no safetensors file, or its metadata
            `moeprune` is damaged.
    """
    if isinstance(path, Header):
        return path
    path = Path(path)
    require_file(path, "a safetensors file")
    if path.stat().st_size == 0:
        raise MoepruneError(f"`{path}` is empty", "write it again")
    try:
        with path.open("rb") as file:
            version = version_of(file.fileno())
            tensors, offsets, metadata = _parse(file)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        if is_pickle(path):
            raise MoepruneError(
                f"`{path}` is a file of torch.save, or another pickle, expected a safetensors file",
                f"convert it first: `moeprune convert {path} -o converted.safetensors`",
            ) from None
        raise unreadable(path, f"Error while deserializing header: {error}") from None
    parsed = None if metadata is None else _parse_metadata(path, metadata)
    return Header(path, tensors, offsets, parsed, version)


def require_unchanged(header: Header) -> None:
    """Raise a MoepruneError if a file is not the one any more whose header was read."""
    if version_of(header.path) != header.version:
        raise MoepruneError(f"`{header.path}` was replaced while it was read", "try again")


def version_of(file: str | Path | int) -> tuple[int, int, int] | None:
    """Return what differs between versions of a file, given by path or descriptor; None if it is missing."""
    try:
        status = os.stat(file)  # noqa: PTH116 (takes a descriptor, too)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def require_file(path: Path, expected: str) -> None:
    """Raise a MoepruneError unless a path leads to a regular file: pipes and devices may never end.

    Args:
        expected: what the file should be, in words.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise MoepruneError(f"no file `{path}`") from None
    except (OSError, ValueError) as error:
        raise MoepruneError(f"cannot read `{path}` ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise MoepruneError(f"`{path}` is a folder, expected {expected}")
    if not stat.S_ISREG(mode):
        raise MoepruneError(f"`{path}` is no regular file, expected {expected}")


def is_pickle(path: Path) -> bool:
    """Whether a file starts as a zip archive of torch.save or a pickle does, and is no safetensors file."""
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises where a name is too long)
        return False
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError:
        return False
    is_length = start[4:] == bytes(4)  # of the header of a safetensors file
    return not is_length and (start.startswith(b"PK\3\4") or (start[:1] == b"\x80" and start[1:2] < b"\6"))


def unreadable(path: Path, reason: object) -> MoepruneError:
    """The error of a file that is no safetensors file, or a damaged one."""
    return MoepruneError(
        f"`{path}` is no safetensors file, or a truncated one ({reason})",
        "a file cut off by a full disk or a broken transfer must be written again",
    )


def require_format(metadata: dict[str, Any], known: int, path: str | Path) -> None:
    """Raise a MoepruneError if the metadata's `format` is not the one that this moeprune reads."""
    if metadata.get("format") != known:
        raise MoepruneError(
            f"`{path}` has format {metadata.get('format')!r}, this moeprune reads {known}",
            "use the moeprune that wrote it, or write it again",
        )


def is_too_large(shape: Iterable[int]) -> bool:
    """Whether torch has no tensors of this shape; a size of 0 counts as 1, for it does so in strides."""
    elements = 1
    for size in shape:
        elements *= max(size, 1)
        if elements >= 2**63:
            return True
    return False


def _parse(file: BinaryIO) -> tuple[dict[str, TensorInfo], dict[str, int], str | None]:
    """The tensors, their offsets, and the text of the key `moeprune`, or a ValueError."""
    header, data_size = _parse_json(file)
    data_start = file.tell()
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("`__metadata__` is no object of texts")
    entries = {name: _parse_entry(name, entry) for name, entry in sorted(header.items())}
    position = 0
    for name, (start, end, tensor) in sorted(entries.items(), key=lambda item: item[1][:2]):
        if start != position or end < start:
            raise ValueError(f"invalid offset for tensor `{name}`")
        if tensor.nbytes != end - start:
            raise ValueError("invalid shape, data type, or offset for tensor")
        position = end
    if position != data_size:
        raise ValueError("incomplete metadata, file not fully covered")
    tensors = {name: tensor for name, (_, _, tensor) in entries.items()}
    offsets = {name: data_start + start for name, (start, _, _) in entries.items()}
    return tensors, offsets, metadata.get(METADATA_KEY)


def _parse_json(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The JSON of the header, and how many bytes follow it."""
    file_size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if file_size < 8:
        raise ValueError("header too small")
    if length > MAX_LENGTH:
        raise ValueError("header too large")
    if length > file_size - 8:
        raise ValueError("invalid header length")
    try:
        header = json.loads(
            file.read(length).decode(), object_pairs_hook=_parse_object, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON in header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("invalid JSON in header: expected an object")
    return header, file_size - 8 - length


def _refuse_constant(name: str) -> None:
    raise ValueError(f"`{name}` is no JSON")


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    for text in (*found, *found.values()):
        if isinstance(text, str):
            text.encode()  # a lone surrogate is no text
    return found


def _parse_entry(name: str, entry: Any) -> tuple[int, int, TensorInfo]:
    """Where the bytes of a tensor start and end, and what it is."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise ValueError(f"tensor `{name}` lacks `dtype`, `shape` or `data_offsets`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"unknown data type of tensor `{name}`")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"`shape` or `data_offsets` of tensor `{name}` are no sizes")
    if is_too_large(shape):
        raise ValueError("overflow computing buffer size from shape and/or element type")
    name_in_torch, bits = DTYPES[dtype]
    nbytes, odd_bits = divmod(math.prod(shape) * bits, 8)
    if odd_bits:
        raise ValueError(f"tensor `{name}` does not end with a byte")
    return *offsets, TensorInfo(name_in_torch, tuple(shape), nbytes)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` is no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` is no JSON object")
    if flaw := _flaw(parsed):
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` cannot be used: {flaw}")
    return parsed


def _flaw(value: Any, where: str = "", depth: int = 0) -> str | None:
    """Why a value that was read as JSON could not be written as JSON again, if that is so."""
    if depth > MAX_DEPTH:
        return f"it is nested more than {MAX_DEPTH} deep"
    if isinstance(value, float) and not math.isfinite(value):
        return f"`{where}` is {value}"
    if isinstance(value, str) and not _is_text(value):
        return f"`{where}` has half a surrogate pair, which is no text"
    parts: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        if odd := next((key for key in value if not _is_text(key)), None):
            return f"{odd!r} in `{where}` has half a surrogate pair, which is no text"
        parts = ((f"{where}.{key}" if where else key, part) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((f"{where}[{index}]", part) for index, part in enumerate(value))
    return next((flaw for at, part in parts if (flaw := _flaw(part, at, depth + 1))), None)


def _is_text(text: str) -> bool:
    """Whether a text can be encoded: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
