"""Checkpoint and analysis files: tensors and one metadata key `moeprune`, read and written safely."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files import replacing

METADATA_KEY = "moeprune"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file: its tensors, memory-mapped, and the JSON of its key `moeprune`, if any."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] | None


def read(path: str | Path) -> TensorFile:
    """Open a safetensors file.

    Raises:
        MoepruneError: it is missing, empty, truncated, or no safetensors file.
    """
    path = Path(path)
    if not os.path.exists(path):  # noqa: PTH110 (Path.exists raises where a name is too long)
        raise MoepruneError(f"no file `{path}`")
    if path.is_dir():
        raise MoepruneError(f"`{path}` is a folder, expected a safetensors file")
    if path.stat().st_size == 0:
        raise MoepruneError(f"`{path}` is empty", "write it again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise MoepruneError(
            f"`{path}` is no safetensors file, or a truncated one ({error})",
            "a file cut off by a full disk or a broken transfer must be written again",
        ) from None
    if metadata is None:
        return TensorFile(path, tensors, None)
    try:
        parsed = json.loads(metadata)
    except (ValueError, RecursionError) as error:
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` is no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise MoepruneError(f"`{path}`: the metadata `{METADATA_KEY}` is no JSON object")
    return TensorFile(path, tensors, parsed)


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file: equal tensors and metadata give equal bytes.

    Raises:
        MoepruneError: the path cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata={METADATA_KEY: text})
    except SafetensorError as error:
        raise MoepruneError(f"cannot write `{path}` ({error})") from None


def require_format(metadata: Mapping[str, Any], known: int, path: str | Path) -> None:
    """Raise a MoepruneError if the metadata's `format` is not the one that this moeprune reads."""
    if metadata.get("format") != known:
        raise MoepruneError(
            f"`{path}` has format {metadata.get('format')!r}, this moeprune reads {known}",
            "use the moeprune that wrote it, or write it again",
        )


def require_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a MoepruneError that lists all missing and unexpected tensors and all wrong shapes."""
    problems = [f"missing `{name}`" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected `{name}`" for name in sorted(set(found) - set(expected))]
    problems += [
        f"`{name}` is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(set(found) & set(expected))
        if found[name].shape != expected[name].shape
    ]
    problems += [
        f"`{name}` has the type {found[name].dtype}, expected floats"
        for name in sorted(set(found) & set(expected))
        if found[name].dtype not in FLOATS
    ]
    if problems:
        raise MoepruneError(f"`{path}` does not fit its own architecture: {'; '.join(problems)}")


def require_one_type(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a MoepruneError that names the tensors whose type is not that of most of them.

    Scores (`score_weights`) are float32 beside weights of any type.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("score_weights")}
    [(usual, _)] = Counter(tensor.dtype for tensor in weights.values()).most_common(1)
    if odd := [f"`{name}` is {t.dtype}" for name, t in sorted(weights.items()) if t.dtype != usual]:
        raise MoepruneError(
            f"`{path}` has tensors of several types: {', '.join(odd)}, the others are {usual}",
            "convert the model to one type, for example with `model.float()`",
        )


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a MoepruneError that names every tensor with NaN or infinite values."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        raise MoepruneError(
            f"`{path}` has NaN or infinite values in {', '.join(f'`{name}`' for name in bad)}",
            "the training diverged or the file is damaged; use an earlier checkpoint",
        )


def fingerprint(tensors: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> str:
    """SHA-256 of an architecture and its tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()
