"""The header of a safetensors file, read without torch.

The library `safetensors` imports numpy or torch whenever it opens a file. Like the library, this reader
checks that the tensors cover the file exactly, so that a truncated file is refused.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from moeprune.errors import MoepruneError
from moeprune.files.disk import MAX_LENGTH, require_file, version_of

METADATA_KEY = "moeprune"
MAX_DEPTH = 100  # limit of the nesting of the metadata's JSON

DTYPES = {
    "BOOL": ("torch.bool", 1), "I8": ("torch.int8", 1), "U8": ("torch.uint8", 1),
    "F8_E8M0": ("torch.float8_e8m0fnu", 1), "F8_E4M3": ("torch.float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("torch.float8_e4m3fnuz", 1), "F8_E5M2": ("torch.float8_e5m2", 1),
    "F8_E5M2FNUZ": ("torch.float8_e5m2fnuz", 1), "I16": ("torch.int16", 2), "U16": ("torch.uint16", 2),
    "F16": ("torch.float16", 2), "BF16": ("torch.bfloat16", 2), "I32": ("torch.int32", 4),
    "U32": ("torch.uint32", 4), "F32": ("torch.float32", 4), "I64": ("torch.int64", 8),
    "U64": ("torch.uint64", 8), "F64": ("torch.float64", 8), "C64": ("torch.complex64", 8),
}  # fmt: skip
"""The name in torch and the bytes of an element, by the name in a file."""
FLOATS = ("torch.float16", "torch.bfloat16", "torch.float32", "torch.float64")


class TensorInfo(msgspec.Struct, frozen=True):
    """A tensor without its values; dtype: by the name in torch; nbytes: of all elements."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Header(msgspec.Struct, frozen=True):
    """The header of a safetensors file.

    offsets: where the bytes of each tensor start in the file. metadata: the JSON of the key `moeprune`, if there is
    one. version: of the file, by `version_of`. digests: the SHA-256 of each tensor's bytes, once they are computed.
    values: the tensors, if torch.save wrote the file; they have no offsets.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    offsets: dict[str, int]
    metadata: dict[str, Any] | None
    version: tuple[int, int, int] | None
    digests: dict[str, str] = {}
    values: dict[str, Any] | None = None


def read_header(path: str | Path | Header) -> Header:
    """Read the header of a safetensors file, or raise a MoepruneError; one that was read is returned as it is."""
    if isinstance(path, Header):
        return path
    path = Path(path)
    require_file(path, "a safetensors file")
    try:
        with path.open("rb") as file:
            version = version_of(file.fileno())
            tensors, offsets, text = _parse(file)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    return Header(path, tensors, offsets, read_metadata(text, path), version)


def read_metadata(text: str | None, path: Path) -> dict[str, Any] | None:
    """Read the JSON of the key `moeprune`, or raise a MoepruneError."""
    try:
        metadata = None if text is None else msgspec.json.decode(text, type=dict[str, Any])
        if (depth := _depth(metadata)) > MAX_DEPTH:
            raise ValueError(f"nested {depth} levels deep, at most {MAX_DEPTH} are expected")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` cannot be read ({error})") from None
    return metadata


def require_unchanged(header: Header) -> None:
    """Raise a MoepruneError if the file was replaced or changed since its header was read."""
    if version_of(header.path) != header.version:
        raise MoepruneError(f"`{header.path}` was replaced while it was read", "try again")


def is_safetensors(path: Path) -> bool:
    """Return True if a file starts like a safetensors file: with the length of a JSON object, and `{`."""
    try:
        require_file(path, "a safetensors file")
        with path.open("rb") as file:
            length, brace = file.read(8), file.read(1)
    except (OSError, MoepruneError):
        return False
    return brace == b"{" and int.from_bytes(length, "little") <= MAX_LENGTH


def unreadable(path: Path, reason: object) -> MoepruneError:
    """Return the error of a file that is not a safetensors file, or a damaged one."""
    hint = "write it again if a full disk or a broken transfer cut it off; name the library (`--source`) or the"
    hint += " function that builds the model (`--model`) if another program wrote it"
    return MoepruneError(f"`{path}` is not a safetensors file, or a truncated one ({reason})", hint)


def require_format(metadata: dict[str, Any], known: int, path: str | Path) -> None:
    """Raise a MoepruneError if the metadata's `format` is not the one that this moeprune reads."""
    found, hint = metadata.get("format"), "use the moeprune that wrote it, or write it again"
    if found != known:
        raise MoepruneError(f"`{path}` has format {found!r}, this moeprune reads {known}", hint)


def is_too_large(shape: Iterable[int]) -> bool:
    """Return True if torch has no tensors of this shape; a size of 0 counts as 1, as it does in strides."""
    elements = 1
    return any((elements := elements * max(size, 1)) >= 2**63 for size in shape)


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def _parse(file: BinaryIO) -> tuple[dict[str, TensorInfo], dict[str, int], str | None]:
    """Return the tensors, their offsets, and the text of the key `moeprune`, or raise a ValueError."""
    file_size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if length > min(MAX_LENGTH, file_size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file_size}")
    header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    texts = msgspec.json.decode(header.pop("__metadata__", b"null"), type=dict[str, str] | None) or {}
    entries = {}
    for name, raw in header.items():
        try:
            entries[name] = entry = msgspec.json.decode(raw, type=_Entry)
        except msgspec.MsgspecError as error:
            raise ValueError(f"tensor `{name}`: {error}") from None
        if entry.dtype not in DTYPES:
            raise ValueError(f"tensor `{name}` has the unknown type {entry.dtype!r}")
        if is_too_large(entry.shape):
            raise ValueError(f"tensor `{name}` is too large")
    tensors, offsets, position = {}, {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype, itemsize = DTYPES[entry.dtype]
        tensors[name] = TensorInfo(dtype, entry.shape, math.prod(entry.shape) * itemsize)
        offsets[name] = 8 + length + position
        if entry.data_offsets != (position, position + tensors[name].nbytes):
            raise ValueError(f"tensor `{name}` is not at the offsets that follow from types and shapes")
        position += tensors[name].nbytes
    if 8 + length + position != file_size:
        raise ValueError(f"the tensors end at byte {8 + length + position} of {file_size}")
    return dict(sorted(tensors.items())), offsets, texts.get(METADATA_KEY)


def _depth(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)
