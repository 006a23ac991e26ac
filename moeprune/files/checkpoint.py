"""Checkpoint and analysis files: safetensors files with one metadata key `moeprune`.

A file is read in blocks where all of its bytes are needed, and mapped into memory where tensors are.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.disk import replacing
from moeprune.files.header import DTYPES, METADATA_KEY, Header, TensorInfo, require_unchanged, unreadable

TORCH_SUFFIXES = (".pt", ".pth", ".bin")  # suffixes of files that torch.save writes
BLOCK = 1 << 18  # bytes that are read, checked or written at once
EXPONENTS = {
    "torch.float16": ("<u2", 0x7C00),
    "torch.bfloat16": ("<u2", 0x7F80),
    "torch.float32": ("<u4", 0x7F80_0000),
    "torch.float64": ("<u8", 0x7FF0_0000_0000_0000),
    "torch.complex64": ("<u4", 0x7F80_0000),  # pairs of float32
}
"""The bits of the exponent by type; all are set in NaN and infinity, in no other value."""


@dataclass(frozen=True)
class Copied:
    """A tensor of a file, to read or to copy into another: all of it, or some rows of an axis.

    axis: all axes before it have the size 1. parts: the axis is as many equal rows; None: one for each place.
    """

    header: Header
    name: str
    rows: Sequence[int] | None = None
    axis: int = 0
    parts: int | None = None


def read_tensors(header: Header) -> dict[str, Tensor]:
    """Return the tensors of a file by name, memory-mapped."""
    if header.values is not None:
        return header.values
    try:
        with safe_open(header.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in header.tensors}
    except (SafetensorError, OSError) as error:
        raise unreadable(header.path, error) from None


def scan(header: Header) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, from one pass over the file; a header remembers them.

    Raises a MoepruneError if the file has changed since its header was read, or has NaN or infinite values.
    """
    if header.digests:
        return header.digests
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(_scan, [Copied(header, name) for name in header.tensors])
        scanned = dict(zip(header.tensors, results, strict=True))
    require_unchanged(header)
    _require_finite({name: finite for name, (_, finite) in scanned.items()}, header.path)
    header.digests.update({name: digest for name, (digest, _) in scanned.items()})
    return header.digests


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a MoepruneError that names every tensor in memory with NaN or infinite values."""
    finite = {name: all(_is_finite(b, str(t.dtype)) for b in _blocks(t)) for name, t in tensors.items()}
    _require_finite(finite, path)


def tensor_infos(entries: Mapping[str, Tensor | Copied]) -> dict[str, TensorInfo]:
    """Return types, shapes and sizes of tensors, as a header has them."""
    return {name: _info(entry) for name, entry in entries.items()}


def fingerprint(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | Header, architecture: Mapping[str, Any]
) -> str:
    """Return the SHA-256 of an architecture (JSON values) and its tensors: names, types, shapes and bytes.

    tensors: of a file, by name, or with their names, each looked at once.

    Raises a MoepruneError if the tensors are those of a file, which `scan` refuses.
    """
    if isinstance(tensors, Header):
        infos, digests = tensors.tensors, scan(tensors)
    else:
        infos, digests = {}, {}
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            infos[name], digests[name] = _info(tensor), _scan(tensor)[0]
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)} {digests[name]}".encode())
    return digest.hexdigest()


def write(
    path: str | Path, entries: Mapping[str, Tensor | Copied], metadata: Mapping[str, Any] | None, overwrite: bool = True
) -> None:
    """Write a safetensors file, a block at a time: equal entries and metadata give equal bytes.

    Raises a MoepruneError if `replacing` does, if values are not finite, or if no file can hold a tensor's type.

    Args:
        entries: the tensors by name: values, or what to copy from another file.
        metadata: for the key `moeprune`; None for a file that is not one of moeprune's own.
    """
    check_finite({name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}, path)
    for header in _sources(entries):
        scan(header)
    write_unscanned(path, entries, metadata, overwrite)


def write_unscanned(
    path: str | Path, entries: Mapping[str, Tensor | Copied], metadata: Mapping[str, Any] | None, overwrite: bool = True
) -> None:
    """Write a safetensors file as `write` does, values as they are; bytes that are not copied are not read."""
    infos = tensor_infos(entries)
    names = {name_in_torch: (name, itemsize) for name, (name_in_torch, itemsize) in DTYPES.items()}
    if odd := [f"`{name}` is {info.dtype}" for name, info in infos.items() if info.dtype not in names]:
        raise MoepruneError(f"cannot write `{path}`: no safetensors file can hold {', '.join(sorted(odd))}")
    order = sorted(infos, key=lambda name: (-names[infos[name].dtype][1], name))  # aligns every tensor
    with replacing(path, overwrite) as temporary, temporary.open("wb") as file:
        file.write(_encode({n: (names[infos[n].dtype][0], infos[n]) for n in order}, metadata))
        for name in order:
            file.writelines(_blocks(entries[name]))
        for header in _sources(entries):
            require_unchanged(header)


def _sources(entries: Mapping[str, Tensor | Copied]) -> list[Header]:
    """Return the headers of the files that entries are copied from."""
    return [*{id(entry.header): entry.header for entry in entries.values() if isinstance(entry, Copied)}.values()]


def write_state_dict(path: str | Path, state: Mapping[str, Any], overwrite: bool = True) -> None:
    """Write tensors for other programs: with torch.save if the suffix is one of its own, else as safetensors.

    Raises a MoepruneError for entries other than tensors, which only torch.save writes.
    """
    if Path(path).suffix in TORCH_SUFFIXES:
        write_torch(path, state, overwrite)
        return
    if odd := [f"`{name}`" for name, entry in state.items() if not isinstance(entry, Tensor)]:
        hint = f"give a path that ends in {' or '.join(TORCH_SUFFIXES)}"
        raise MoepruneError(f"cannot write `{path}`: no safetensors file can hold {', '.join(odd)}", hint)
    write(path, state, None, overwrite)


def write_torch(path: str | Path, content: Mapping[str, Any], overwrite: bool = True) -> None:
    """Write a dict with torch.save."""
    with replacing(path, overwrite) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(content), file)  # given a path, torch would write its name into the file
        except RuntimeError as error:  # torch hides an error of the disk behind one of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def file_blocks(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a file from an offset, in blocks; each is overwritten by the next."""
    buffer = memoryview(bytearray(min(BLOCK, nbytes)))
    with path.open("rb") as file:
        file.seek(offset)
        while nbytes:
            block = buffer[:nbytes]
            if file.readinto(block) != len(block):
                raise OSError("the file became shorter while it was read")
            yield block
            nbytes -= len(block)


def _blocks(entry: Tensor | Copied) -> Iterator[memoryview]:
    if isinstance(entry, Copied) and entry.header.values is not None:
        values = entry.header.values[entry.name]
        assert entry.parts is None
        entry = values if entry.rows is None else values.index_select(entry.axis, torch.tensor(entry.rows))
    if isinstance(entry, Tensor):
        data = entry.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        yield from (data[start : start + BLOCK] for start in range(0, len(data), BLOCK))
        return
    info, offset = entry.header.tensors[entry.name], entry.header.offsets[entry.name]
    try:
        if entry.rows is None:
            yield from file_blocks(entry.header.path, offset, info.nbytes)
            return
        row_bytes = info.nbytes // (entry.parts or info.shape[entry.axis])
        for first, count in _runs(entry.rows):
            yield from file_blocks(entry.header.path, offset + first * row_bytes, count * row_bytes)
    except OSError as error:
        raise unreadable(entry.header.path, error) from None


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first of consecutive rows and their number."""
    first = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[first], place - first
            first = place


def _scan(entry: Tensor | Copied) -> tuple[str, bool]:
    """Return the SHA-256 of a tensor's bytes, and whether all of its values are finite."""
    digest, finite, dtype = hashlib.sha256(), True, _info(entry).dtype
    for block in _blocks(entry):
        digest.update(block)
        finite = finite and _is_finite(block, dtype)
    return digest.hexdigest(), finite


def _is_finite(block: memoryview, dtype: str) -> bool:
    """Return False if a block of at least one value holds NaN or infinity."""
    if dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[dtype]
    return bool((np.frombuffer(block, kind) & exponent).max() != exponent)


def _require_finite(finite: Mapping[str, bool], path: str | Path) -> None:
    if bad := ", ".join(f"`{name}`" for name in sorted(finite) if not finite[name]):
        hint = "the training diverged or the file is damaged; use an earlier checkpoint"
        raise MoepruneError(f"`{path}` has NaN or infinite values in {bad}", hint)


def _info(entry: Tensor | Copied) -> TensorInfo:
    if isinstance(entry, Tensor):
        return TensorInfo(str(entry.dtype), tuple(entry.shape), entry.nbytes)
    info = entry.header.tensors[entry.name]
    if entry.rows is None:
        return info
    axis, whole = entry.axis, info.shape[entry.axis]
    parts = entry.parts or whole
    shape = (*info.shape[:axis], whole // parts * len(entry.rows), *info.shape[axis + 1 :])
    return TensorInfo(info.dtype, shape, info.nbytes // parts * len(entry.rows))


def _encode(infos: Mapping[str, tuple[str, TensorInfo]], metadata: Mapping[str, Any] | None) -> bytes:
    """Return the length and the JSON of a header, given the type's name in files with each tensor."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else {METADATA_KEY: text}}
    end = 0
    for name, (dtype, info) in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": dtype, "shape": info.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
