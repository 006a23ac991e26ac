"""Static pruning from file to file: kept bytes are copied block by block, and no model is built."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.files.checkpoint import combined_fingerprint, is_finite, not_finite, read_blocks, torch_dtype
from moeprune.files.header import METADATA_KEY, ORDER, Header, TensorInfo, name_in_file, unreadable
from moeprune.files.writing import replacing


@dataclass(frozen=True)
class Copied:
    """A tensor that is copied from the other file: all of it, or some rows of its first axis."""

    source: str
    rows: Sequence[int] | None = None


Entry = Tensor | Copied
"""What a tensor of the new file is made of: values in memory, or rows of a tensor of the old one."""


def write_from(header: Header, path: Path, entries: dict[str, Entry], metadata: dict[str, Any]) -> None:
    """Write a checkpoint of tensors in memory and of rows of another checkpoint's tensors.

    The bytes are those that `moeprune.models.model.save` writes for the same tensors and metadata.

    Args:
        header: of the other checkpoint.
        path: to write.
        entries: by name.
        metadata: of the new checkpoint.

    Raises:
        MoepruneError: the path cannot be written, or values are NaN or infinite.
    """
    infos = {name: _info(header, entry) for name, entry in entries.items()}
    names = sorted(infos, key=lambda name: (ORDER.index(name_in_file(infos[name].dtype)), name))
    infos = {name: infos[name] for name in names}
    bad = []
    with (
        replacing(path) as temporary,
        header.path.open("rb") as old,
        temporary.open("wb") as new,
    ):
        new.write(_encode(infos, metadata))
        for name, info in infos.items():
            dtype, finite = torch_dtype(info), True
            for block in _blocks(header, old, entries[name]):
                finite = finite and is_finite(torch.frombuffer(block, dtype=dtype))
                new.write(block)
            if not finite:
                bad.append(name)
        if bad:
            raise not_finite(sorted(bad), header.path)


def file_fingerprint(header: Header) -> str:
    """The fingerprint that a checkpoint was written with, or else that of its tensors, read in blocks."""
    assert header.metadata is not None
    written = header.metadata.get("fingerprint")
    if isinstance(written, str):
        return written
    digests = {}
    with header.path.open("rb") as file:
        for name in header.tensors:
            digest = hashlib.sha256()
            for block in _blocks(header, file, Copied(name)):
                digest.update(block)
            digests[name] = digest.hexdigest()
    return combined_fingerprint(header.tensors, digests, header.metadata["architecture"])


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor of a checkpoint, read into memory."""
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.offsets[name])
        data = bytearray(file.read(info.nbytes))
    return torch.frombuffer(data, dtype=torch_dtype(info)).view(info.shape)


def _info(header: Header, entry: Entry) -> TensorInfo:
    if isinstance(entry, Tensor):
        return TensorInfo(str(entry.dtype), tuple(entry.shape), entry.nbytes)
    source = header.tensors[entry.source]
    if entry.rows is None:
        return source
    row_bytes = source.nbytes // source.shape[0]
    return TensorInfo(source.dtype, (len(entry.rows), *source.shape[1:]), len(entry.rows) * row_bytes)


def _blocks(header: Header, old: io.BufferedReader, entry: Entry) -> Iterator[bytearray | memoryview]:
    """The bytes of a new tensor, a block at a time."""
    if isinstance(entry, Tensor):
        if entry.numel():
            yield memoryview(bytearray(entry.contiguous().flatten().view(torch.uint8).numpy().tobytes()))
        return
    info, offset = header.tensors[entry.source], header.offsets[entry.source]
    row_bytes = info.nbytes if entry.rows is None else info.nbytes // info.shape[0]
    try:
        for row in (0,) if entry.rows is None else entry.rows:
            yield from read_blocks(old, offset + row * row_bytes, row_bytes)
    except OSError as error:
        raise unreadable(header.path, error) from None


def _encode(infos: dict[str, TensorInfo], metadata: dict[str, Any]) -> bytes:
    """The length and the JSON of a header, as the library `safetensors` writes them."""
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    position = 0
    for name, info in infos.items():
        offsets = [position, position + info.nbytes]
        header[name] = {
            "dtype": name_in_file(info.dtype), "shape": list(info.shape), "data_offsets": offsets,
        }  # fmt: skip
        position += info.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
