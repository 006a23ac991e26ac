"""Checkpoints as other programs wrote them, read as a plain dict of tensors.

What a file is, is told from its content, never from its suffix, and nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.header import FLOATS, MAX_LENGTH, Header, read_header, require_file

INDEX_SUFFIX = ".safetensors.index.json"
STATE_DICT_KEYS = (
    "state_dict", "model", "model_state_dict", "model_ema", "ema", "state_dict_ema", "module", "net",
    "network",
)  # fmt: skip
"""Where training checkpoints keep their weights, one or two levels deep."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning put before every name."""

DTYPES = {
    *FLOATS, "torch.bool", "torch.int8", "torch.int16", "torch.int32", "torch.int64",
    "torch.uint8", "torch.uint16", "torch.uint32", "torch.uint64",
}  # fmt: skip
LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:]
SAFE_WAY = (
    "moeprune runs no code from a file. Where you trust the file, load it with"
    " `found = torch.load(FILE, map_location='cpu', weights_only=False)` and save the tensors alone:"
    " `torch.save(found['state_dict'], NEW)`, or whichever entry holds them, or, if it is a whole model,"
    " `torch.save(found.state_dict(), NEW)`"
)


@dataclass(frozen=True)
class StateDict:
    """The tensors of a foreign checkpoint by name, in the order of the file.

    Args:
        path: what was given to read.
        tensors: on the CPU, detached, in the file's own types. Memory-mapped, unless the file has torch's
            legacy format. They may be views that are not contiguous, and share memory.
        key: where in a training checkpoint they stood, such as `model.state_dict`; None at the top.
        prefix: what was taken off the front of every name, such as `module.`, or an empty text.
        files: the files that were read: one, or an index and its shards.
    """

    path: Path
    tensors: dict[str, Tensor]
    key: str | None
    prefix: str
    files: tuple[Path, ...]

    def sha256(self) -> str:
        """SHA-256 of the file; of several, that of the lines `sha256sum` prints for them, by name.

        Raises:
            MoepruneError: a file cannot be read any more.
        """
        digests = {file.name: _sha256(file) for file in self.files}
        if len(digests) == 1:
            return digests[self.files[0].name]
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def check_finite(self) -> None:
        """Raise a MoepruneError that names every tensor with NaN or infinite values, read in blocks."""
        checkpoint.check_finite(self.tensors, self.path)


def read_state_dict(path: str | Path, key: str | None = None) -> StateDict:
    """Read the tensors of a checkpoint that any program wrote.

    Reads `.safetensors` files; sharded ones, given by their index or by the folder that holds it; and what
    `torch.save` wrote: state dicts, and training checkpoints with one among other things.

    Args:
        path: a file, or a folder with one `*.safetensors.index.json`.
        key: which entry of a training checkpoint to take, such as `model_ema` or `model.state_dict`. Needed
            where several entries hold tensors.

    Raises:
        MoepruneError: there is no such file; it is empty, truncated, damaged, or of another kind; it needs
            code to be loaded; no entry or several entries hold tensors; an entry is no dense tensor of
            floats, integers or bool; shards and index contradict each other.
    """
    path = Path(path)
    is_folder = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where a name is too long)
    file = _index_in(path) if is_folder else path
    kind = _kind(file)
    if kind in ("zip", "legacy"):
        loaded = _load(file, mmap=kind == "zip")
        found, key = _find_state_dict(loaded, key, file)
        files: tuple[Path, ...] = (file,)
    elif key is not None:
        raise MoepruneError(
            f"`{path}` has no key `{key}`: safetensors files hold no nested entries", "leave the key away"
        )
    else:
        found, files = _read_safetensors(file) if kind == "safetensors" else _read_shards(file)
    tensors = _checked_tensors(found, path, key, sum(part.stat().st_size for part in files))
    prefix = _common_prefix(tensors)
    return StateDict(path, {n.removeprefix(prefix): t for n, t in tensors.items()}, key, prefix, files)


# What a file is


def _kind(path: Path) -> str:
    """One of `safetensors`, `index`, `zip` and `legacy`, by the first bytes, or a MoepruneError."""
    start = _first_bytes(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_LENGTH:
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if LEGACY_MAGIC in start[:32]:
        return "legacy"
    if start.lstrip().startswith(b"{"):
        return "index"
    if start.startswith(b"\x80"):
        raise MoepruneError(f"`{path}` is a pickle that `torch.save` did not write", SAFE_WAY)
    if start[257:262] == b"ustar":
        raise MoepruneError(
            f"`{path}` is a tar archive; checkpoints of this format (torch before 0.1.10) cannot be loaded"
            " without running code",
            SAFE_WAY,
        )
    if start.startswith(b"version https://git-lfs"):
        raise MoepruneError(f"`{path}` is a pointer of Git LFS, not the file itself", "run `git lfs pull`")
    raise MoepruneError(
        f"`{path}` is no checkpoint, or a truncated one: it starts with {start[:16]!r}, as no safetensors"
        " file, index or torch file does",
        "a file cut off by a full disk or a broken transfer must be written again",
    )


def _first_bytes(path: Path) -> bytes:
    require_file(path, "a checkpoint")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise _cannot_read(path, error) from None
    if not start:
        raise MoepruneError(f"`{path}` is empty", "write it again")
    return start


def _cannot_read(path: Path, error: Exception) -> MoepruneError:
    return MoepruneError(f"cannot read `{path}` ({getattr(error, 'strerror', None) or error})")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(checkpoint.BLOCK):
                digest.update(block)
    except OSError as error:
        raise _cannot_read(path, error) from None
    return digest.hexdigest()


# Torch files


def _load(path: Path, mmap: bool) -> Any:
    """What a torch file holds, loaded without any code from it."""
    if mmap:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are no concern of the user
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise _refused(path, error) from None


def _check_archive(path: Path) -> None:
    """Raise a MoepruneError if a zip file is not one of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = {PurePosixPath(record.filename).name: record for record in archive.infolist()}
            packed = any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist())
    except Exception as error:
        raise _damaged(path, error) from None
    if "constants.pkl" in records:
        raise MoepruneError(
            f"`{path}` is a TorchScript archive (`torch.jit.save`): a program, not only tensors",
            "where you trust it, save the tensors alone:"
            " `torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW)`",
        )
    if "data.pkl" not in records:
        raise MoepruneError(
            f"`{path}` is a zip file that `torch.save` did not write (it has no `data.pkl`)",
            "save the model with `torch.save(model.state_dict(), NEW)`",
        )
    if packed:
        raise MoepruneError(
            f"`{path}` is a torch file that was compressed afterwards (`torch.save` does not compress)",
            "save the model again with `torch.save(model.state_dict(), NEW)`",
        )


def _refused(path: Path, error: Exception) -> MoepruneError:
    """The error of a file that `torch.load` did not take."""
    cause = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
    if match := re.search(r"GLOBAL (\S+)", str(cause)):
        return MoepruneError(
            f"`{path}` cannot be loaded without running code: it contains `{match[1]}`, which is no tensor",
            "this is how training checkpoints look that hold objects such as `args`, `config` or numpy"
            f" numbers beside the weights, or a whole model instead of its state dict. {SAFE_WAY}",
        )
    if isinstance(error, pickle.UnpicklingError):
        return MoepruneError(
            f"`{path}` is damaged, or cannot be loaded without running code ({_one_line(cause)})", SAFE_WAY
        )
    return _damaged(path, error)


def _damaged(path: Path, error: BaseException) -> MoepruneError:
    return MoepruneError(
        f"`{path}` is a torch file that torch cannot read: truncated or damaged ({_one_line(error)})",
        "a file cut off by a full disk or a broken transfer must be written again",
    )


def _one_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


# The state dict in a training checkpoint


def _find_state_dict(loaded: Any, key: str | None, path: Path) -> tuple[dict[Any, Any], str | None]:
    """The one dict that holds tensors, and its key, or a MoepruneError."""
    start = _entry(loaded, key, path)
    at = () if key is None else (key,)
    candidates = dict(_candidates(start, at, depth=2))
    if len(candidates) > 1:
        raise MoepruneError(
            f"`{path}` holds several state dicts: {_quoted(candidates)}",
            f"choose one, for example with `--key {next(reversed(candidates))}`",
        )
    for name, found in candidates.items():
        return found, name or None
    where = f"`{path}`" if key is None else f"`{key}` in `{path}`"
    if not isinstance(start, dict):
        raise MoepruneError(f"{where} holds a {type(start).__name__}, expected a dict of tensors by name")
    names = [str(name) for name, _ in _items(start)]
    others = [str(name) for name, value in _items(start) if _holds_tensors(value)]
    raise MoepruneError(
        f"{where} holds no state dict: it has {_quoted(names) or 'no entries'}, expected tensors by name,"
        f" there or under {_quoted(STATE_DICT_KEYS)}",
        f"tensors are under {_quoted(others)}; choose one with `--key`"
        if others
        else "save `model.state_dict()`",
    )


def _candidates(value: Any, at: tuple[str, ...], depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The dicts of tensors under known keys, or else the value itself if it is one."""
    entries = dict(_items(value))
    nested = [
        found
        for name in STATE_DICT_KEYS
        if depth and isinstance(entries.get(name), dict)
        for found in _candidates(entries[name], (*at, name), depth - 1)
    ]
    if nested:
        yield from nested
    elif _holds_tensors(value):
        yield ".".join(at), entries


def _entry(loaded: Any, key: str | None, path: Path) -> Any:
    """What stands under a key such as `model` or `model.state_dict`."""
    for name in [] if key is None else key.split("."):
        entries = dict(_items(loaded))
        if name not in entries:
            nested = [str(n) for n, entry in entries.items() if isinstance(entry, dict)]
            raise MoepruneError(
                f"`{path}` has no key `{key}`",
                f"there are {_quoted(nested)}" if nested else "it has no nested entries; leave the key away",
            )
        loaded = entries[name]
    return loaded


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The entries of a dict, by the method of dict: an OrderedDict from a file may carry one of its own."""
    return list(dict.items(value)) if isinstance(value, dict) else []


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(entry, Tensor) for _, entry in _items(value))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Tensors


def _checked_tensors(
    found: Mapping[Any, Any], path: Path, key: str | None, file_size: int
) -> dict[str, Tensor]:
    """Plain tensors, or a MoepruneError that names all entries that are none."""
    odd = {str(name): reason for name, entry in found.items() if (reason := _oddity(name, entry, file_size))}
    if odd:
        where = "" if key is None else f" under `{key}`"
        listed = ", ".join(f"`{name}` {reason}" for name, reason in sorted(odd.items()))
        raise MoepruneError(
            f"`{path}` has entries{where} that are no plain tensors: {listed}",
            "save `model.state_dict()` of the model in floats, with nothing beside the tensors",
        )
    if not found:
        raise MoepruneError(f"`{path}` holds no tensors")
    return {name: Tensor.detach(tensor) for name, tensor in found.items()}


def _oddity(name: Any, entry: Any, file_size: int) -> str | None:
    """Why an entry is no dense tensor on the CPU of a known type, if it is none."""
    if not isinstance(name, str):
        return f"has a name of type {type(name).__name__}"
    if type(entry) not in (Tensor, torch.nn.Parameter):
        return f"is of type {type(entry).__name__}"
    if entry.device.type != "cpu":
        return f"has no values (device {entry.device.type})"
    if entry.is_quantized:
        return f"is quantized ({entry.dtype})"
    if entry.layout != torch.strided:
        return f"is sparse ({entry.layout})"
    if entry.is_nested:
        return "is a nested tensor"
    if str(entry.dtype) not in DTYPES:
        return f"has the type {entry.dtype}"
    if entry.numel() * entry.element_size() > file_size:
        return f"has the shape {list(entry.shape)}, larger than the whole file"
    return None


def _common_prefix(names: Iterable[str]) -> str:
    """What all names start with that wrappers put there, in any nesting."""
    names, found = list(names), ""
    while prefix := next((p for p in PREFIXES if all(n.startswith(found + p) for n in names)), None):
        found += prefix
    return "" if found in names else found


# Safetensors files and shards


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    header = read_header(path)
    _check_types([header], path)
    return checkpoint.read_tensors(header), (path,)


def _check_types(headers: Iterable[Header], path: Path) -> None:
    """Raise a MoepruneError that names the tensors of types that torch cannot hold, or that are packed."""
    infos = [item for header in headers for item in header.tensors.items()]
    if odd := [f"`{name}` has the type {info.dtype}" for name, info in infos if info.dtype not in DTYPES]:
        raise MoepruneError(
            f"`{path}` has entries that are no plain tensors: {', '.join(sorted(odd))}",
            "save `model.state_dict()` of the model in floats of 16 bits or more",
        )


def _index_in(folder: Path) -> Path:
    """The one index in a folder."""
    try:
        files = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise _cannot_read(folder, error) from None
    found = [name for name in files if name.endswith(INDEX_SUFFIX)]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise MoepruneError(f"`{folder}` has several indexes: {_quoted(found)}", "give one of them")
    checkpoints = [
        name for name in files if Path(name).suffix in {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
    ]
    raise MoepruneError(
        f"`{folder}` is a folder without an index `*{INDEX_SUFFIX}`",
        f"give one of its files: {_quoted(checkpoints)}" if checkpoints else "give a checkpoint file",
    )


def _read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """The tensors of all shards of an index, in its order, and the files."""
    weight_map, total_size = _parse_index(index)
    shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    missing = [name for name, shard in shards.items() if not os.path.exists(shard)]  # noqa: PTH110 (as above)
    if missing:
        raise MoepruneError(f"`{index}` names shards that are missing: {_quoted(missing)}", "fetch them, too")
    for shard in shards.values():
        if _kind(shard) != "safetensors":
            raise MoepruneError(
                f"`{shard}` is no safetensors file, as the shards of `{index.name}` must be",
                "load the model with the library that wrote it, and save its state dict in one file",
            )
    headers = {name: read_header(shard) for name, shard in shards.items()}
    _check_types(headers.values(), index)
    _check_shards(weight_map, total_size, headers, index)
    files = {name: checkpoint.read_tensors(header) for name, header in headers.items()}
    return {name: files[shard][name] for name, shard in weight_map.items()}, (index, *shards.values())


def _parse_index(path: Path) -> tuple[dict[str, str], Any]:
    """The shard of each tensor, and the bytes of all, if the index says so."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ValueError(f"duplicate {_quoted(sorted(name for name in counts if counts[name] > 1))}")
        return found

    try:
        if path.stat().st_size > MAX_LENGTH:
            raise ValueError(f"longer than {MAX_LENGTH} bytes")
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError, OSError) as error:
        raise MoepruneError(
            f"`{path}` is no JSON that can be read ({error})", "fetch or write the index again"
        ) from None
    weight_map = index.get("weight_map")  # a dict: the text starts with `{`
    metadata = index.get("metadata") or {}
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
        or not isinstance(metadata, dict)
    ):
        raise MoepruneError(
            f"`{path}` is no index of a sharded checkpoint: it lacks `weight_map`, an object from names of"
            " tensors to names of files",
            f"give the `*{INDEX_SUFFIX}`, a safetensors file or a torch file",
        )
    if outside := sorted({shard for shard in weight_map.values() if not _is_file_name(shard)}):
        raise MoepruneError(
            f"`{path}` names shards that do not lie beside it: {_quoted(outside)}",
            "put all shards in the folder of the index, and name them without a folder",
        )
    return weight_map, metadata.get("total_size")


def _is_file_name(text: str) -> bool:
    """Whether it names a file and no folder, on any system."""
    same = PurePosixPath(text).name == PureWindowsPath(text).name == text
    return same and text not in {"", ".."} and text.isprintable()


def _check_shards(
    weight_map: Mapping[str, str], total_size: Any, headers: Mapping[str, Header], index: Path
) -> None:
    """Raise a MoepruneError that lists all differences between an index and its shards."""
    holders: dict[str, list[str]] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            holders.setdefault(name, []).append(shard)
    problems = []
    for name in sorted({*weight_map, *holders}):
        found, expected = holders.get(name, []), weight_map.get(name)
        if expected is None:
            problems.append(f"unexpected `{name}` in {_quoted(found)}")
        elif len(found) > 1:
            problems.append(f"duplicate `{name}` in {_quoted(found)}")
        elif not found:
            problems.append(f"missing `{name}` in `{expected}`")
        elif found != [expected]:
            problems.append(f"`{name}` is in `{found[0]}`, expected in `{expected}`")
    size = sum(tensor.nbytes for header in headers.values() for tensor in header.tensors.values())
    if total_size is not None and total_size != size:
        problems.append(f"`total_size` is {total_size!r}, expected {size}")
    if problems:
        raise MoepruneError(
            f"`{index}` does not fit its shards: {'; '.join(problems)}",
            "index and shards are of different models or damaged; fetch or write them again, together",
        )
