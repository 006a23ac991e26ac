"""Checkpoint and analysis files: tensors and one metadata key `moeprune`, read and written safely."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files.header import METADATA_KEY, Header, TensorInfo, read_header, unreadable
from moeprune.files.writing import replacing

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
"""Of files that are written with torch.save, and not as safetensors."""

BLOCK = 1 << 20
"""Bytes that are read at once where a file is read in blocks."""


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: its header, and its tensors by name, memory-mapped."""

    header: Header
    tensors: dict[str, Tensor]


def read(path: str | Path) -> TensorFile:
    """Open a safetensors file.

    Raises:
        MoepruneError: it is missing, empty, truncated, or no safetensors file, or its metadata
            `moeprune` is damaged.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return TensorFile(header, {name: file.get_tensor(name) for name in header.tensors})
    except (SafetensorError, OSError) as error:
        raise unreadable(header.path, error) from None


def version_of(path: str | Path) -> tuple[int, ...] | None:
    """What tells one version of a file from the next; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 (Path.stat too raises where a name is too long)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None) -> None:
    """Write a safetensors file: equal tensors and metadata give equal bytes.

    Args:
        metadata: for the key `moeprune`, or None for a file that is not to be moeprune's own.

    Raises:
        MoepruneError: the path cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    texts = {"format": "pt"} if metadata is None else {METADATA_KEY: text}
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata=texts)
    except SafetensorError as error:
        raise MoepruneError(f"cannot write `{path}` ({error})") from None


def write_state_dict(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors for other programs: by torch.save with a suffix .pt, .pth or .bin, else as safetensors.

    Raises:
        MoepruneError: the path cannot be written.
    """
    if Path(path).suffix not in TORCH_SUFFIXES:
        write(path, tensors, None)
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(dict(tensors), file)  # by a path, its name would be in the bytes
        except RuntimeError as error:  # torch's own, after one of the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def tensor_infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """The tensors without their values."""
    return {name: TensorInfo(str(t.dtype), tuple(t.shape), t.nbytes) for name, t in tensors.items()}


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a MoepruneError that names every tensor with NaN or infinite values."""
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise not_finite(bad, path)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and nothing infinite: its least and greatest value tell, and fast."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_finite_in_file(header: Header) -> None:
    """The same for the float tensors of a file, read in blocks: no page of a memory map is touched."""
    bad = []
    try:
        with header.path.open("rb") as file:
            for name in sorted(header.tensors, key=header.offsets.__getitem__):
                dtype = torch_dtype(header.tensors[name])
                blocks = read_blocks(file, header.offsets[name], header.tensors[name].nbytes)
                if not all(is_finite(torch.frombuffer(block, dtype=dtype)) for block in blocks):
                    bad.append(name)
    except OSError as error:
        raise unreadable(header.path, error) from None
    if bad:
        raise not_finite(sorted(bad), header.path)


def read_blocks(file: io.BufferedReader, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes of a file from an offset on, in blocks; each is overwritten by the next.

    Raises:
        OSError: the file is shorter.
    """
    buffer = memoryview(bytearray(min(BLOCK, nbytes)))
    file.seek(offset)
    while nbytes:
        block = buffer[: min(nbytes, len(buffer))]
        if file.readinto(block) != len(block):
            raise OSError("the file became shorter while it was read")
        yield block
        nbytes -= len(block)


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The type of a tensor, as torch knows it."""
    return getattr(torch, info.dtype.removeprefix("torch."))


def not_finite(names: list[str], path: str | Path) -> MoepruneError:
    """The error of tensors with NaN or infinite values."""
    return MoepruneError(
        f"`{path}` has NaN or infinite values in {', '.join(f'`{name}`' for name in names)}",
        "the training diverged or the file is damaged; use an earlier checkpoint",
    )


def fingerprint(tensors: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """SHA-256 of an architecture and its tensors: names, types, shapes and bytes."""
    digests = {}
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous().flatten()
        digests[name] = hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()
    return combined_fingerprint(tensor_infos(tensors), digests, architecture)


def combined_fingerprint(
    infos: Mapping[str, TensorInfo], digests: Mapping[str, str], architecture: Mapping[str, Any]
) -> str:
    """The same from the SHA-256 of each tensor's bytes."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, info in sorted(infos.items()):
        digest.update(f"{name} {info.dtype} {list(info.shape)} {digests[name]}".encode())
    return digest.hexdigest()
