"""Checkpoints that other programs wrote, read as a plain dict of tensors.

A file is recognised by its contents, not its suffix, and no code in it is ever run.
"""

import codecs
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.disk import read_json, refused, require_file, version_of
from moeprune.files.header import DTYPES, METADATA_KEY, Header, is_safetensors, read_header, read_metadata
from moeprune.files.pickles import Inert, load_torch, needs_code
from moeprune.records import from_json

logger = logging.getLogger(__name__)

INDEX_SUFFIXES = ".safetensors.index.json", ".bin.index.json"  # the first is preferred
STATE_DICT_KEYS = (
    "state_dict", "model", "model_state_dict", "model_ema", "ema", "state_dict_ema", "module", "net",
    "network",
)  # fmt: skip
"""Keys under which training checkpoints keep their weights, one or two levels deep."""

PLAIN_TYPES = {name for name, _ in DTYPES.values() if not re.search("float8", name)}
EXTRA = "_extra_state"  # the end of a name under which torch keeps what is no parameter or buffer


@dataclass(frozen=True)
class StateDict:
    """The tensors of a foreign checkpoint by name, in the order of the file, and the files that were read.

    The tensors are on the CPU, detached, of the file's own types, and memory-mapped, unless the file has torch's
    legacy format. They may be views that share memory.

    extra: entries that are not tensors, which modules of the user's own code may have (`_extra_state`).
    versions: of the modules, by their names, as torch writes them into its own files (`_metadata`).
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def sha256(self) -> str:
        """Return the SHA-256 of the bytes of all files, one after the other."""
        digest = hashlib.sha256()
        for path in self.files:
            try:
                for block in checkpoint.file_blocks(path, 0, path.stat().st_size):
                    digest.update(block)
            except OSError as error:
                raise refused("read", path, error) from None
        return digest.hexdigest()


def read_state_dict(path: str | Path, key: str | None = None) -> StateDict:
    """Read the tensors of a checkpoint that any program wrote.

    Reads `.safetensors` files; sharded ones, given by their index or by the folder that holds it; and what `torch.save`
    wrote: state dicts, and training checkpoints with one among other things. Raises a MoepruneError for other files,
    for those that need code to be loaded, and for shards that contradict their index.

    Args:
        path: a file, or a folder with one `*.safetensors.index.json` or `*.bin.index.json`.
        key: the entry of a training checkpoint to take, such as `model_ema` or `model.state_dict`. Needed if several
            entries hold tensors.
    """
    path = Path(path)
    file = _index_in(path) if os.path.isdir(path) else path  # noqa: PTH112 (Path.is_dir fails for long names)
    start = _first_bytes(file)
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") and not is_safetensors(file):
        if key is not None:
            raise _no_entries(path, key)
        entries, files = _read_shards(file)
    else:
        entries, files = _read_entries(file, start, key), (file,)
    extra = {name: entry for name, entry in _items(entries).items() if _is_extra(name, entry)}
    plain = {name: entry for name, entry in _items(entries).items() if name not in extra}
    tensors = _plain_tensors(plain, path, sum(part.stat().st_size for part in files))
    return StateDict(tensors, files, extra, _versions(entries))


def _read_entries(file: Path, start: bytes, key: str | None) -> dict[Any, Any]:
    """Return the state dict in one file; start: its first bytes."""
    if not is_safetensors(file):
        return _find_state_dict(load_torch(file, start), key, file)
    if key is not None:
        raise _no_entries(file, key)
    return checkpoint.read_tensors(read_header(file))


def _no_entries(path: Path, key: str) -> MoepruneError:
    return MoepruneError(f"`{path}` has no key `{key}`: safetensors files hold no entries", "omit the key")


def _first_bytes(file: Path) -> bytes:
    require_file(file, "a checkpoint")
    try:
        with file.open("rb") as opened:
            return opened.read(64)
    except OSError as error:
        raise refused("read", file, error) from None


def read_own(path: Path) -> Header | None:
    """Return the header and tensors of a checkpoint that moeprune wrote with torch.save; None for other files."""
    version = version_of(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        text = found.get(METADATA_KEY)
    except Exception:  # a damaged file can make the unpickler raise anything; it is told by `read_state_dict`
        return None
    if not isinstance(text, str):
        return None
    tensors = _plain_tensors(found.get("state_dict") or {}, path, path.stat().st_size)
    return Header(path, checkpoint.tensor_infos(tensors), {}, read_metadata(text, path), version, {}, tensors)


def _find_state_dict(loaded: Any, key: str | None, path: Path) -> dict[Any, Any]:
    """Return the one dict of a training checkpoint that holds tensors."""
    entries = _items(loaded)
    hidden = [name for name in STATE_DICT_KEYS if isinstance(entries.get(name), Inert)]
    found = dict(_state_dicts(loaded))
    start = key or ""
    inside = [name for name in found if name == start or _is_within(name, start)]
    known = [name for name in inside if {*name.removeprefix(start).split(".")} <= {"", *STATE_DICT_KEYS}]
    known = [name for name in known if not any(_is_within(other, name) for other in known)]
    if len(known) == 1 and not (hidden and key is None):
        return found[known[0]]
    objects = [loaded, entries.get(key), *(entries[name] for name in hidden if key is None)]
    for held in (entries, *(_items(entries.get(name)) for name in STATE_DICT_KEYS)):
        if held and all(isinstance(entry, Inert) for entry in held.values()):  # such as weights as NumPy arrays
            objects += held.values()
    objects = [entry for entry in objects if isinstance(entry, Inert)]
    if objects and not known:
        raise needs_code(path, objects[0].origin)
    if len(known) == 1:
        kind = f"`{objects[0].origin}`, which only its own code can load"
        message = f"`{path}` holds weights under `{known[0]}`, and under `{hidden[0]}` an object of {kind}"
        raise MoepruneError(message, f"to take the weights, add `--key {known[0]}`")
    if known:
        hint = f"choose one, for example with `--key {known[-1]}`"
        raise MoepruneError(f"`{path}` holds several state dicts: {_quoted(known)}", hint)
    where = f" under `{key}`" if key else ""
    expected = f"expected tensors by name, at the top or under {_quoted(STATE_DICT_KEYS)}"
    hint = f"choose one with `--key`: {_quoted(found)}" if any(found) else "save `model.state_dict()`"
    raise MoepruneError(f"`{path}` ({type(loaded).__name__}) holds no state dict{where}: {expected}", hint)


def _is_within(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _state_dicts(value: Any, key: str = "", depth: int = 3) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the dicts that hold tensors, with the names that lead to them."""
    entries = _items(value)
    if any(isinstance(entry, Tensor) for entry in entries.values()):
        yield key, value
    for name, entry in entries.items() if depth else ():
        if isinstance(name, str):
            yield from _state_dicts(entry, f"{key}.{name}" if key else name, depth - 1)


def _items(value: Any) -> dict[Any, Any]:
    """Return the entries of a dict, none of other values; an OrderedDict from a file may have its own `items`."""
    return dict(dict.items(value)) if isinstance(value, dict) else {}


def _versions(value: Any) -> dict[str, dict[str, Any]]:
    """Return the versions of modules that torch wrote beside a state dict."""
    found = vars(value).get("_metadata") if type(value) is OrderedDict else None
    return {name: _items(entry) for name, entry in _items(found).items() if isinstance(name, str)}


def _is_extra(name: Any, entry: Any) -> bool:
    is_extra = isinstance(name, str) and name.endswith(EXTRA) and not isinstance(entry, Tensor)
    return is_extra and not _holds_inert(entry)


def _holds_inert(value: Any) -> bool:
    parts = (
        _items(value).values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    )
    return isinstance(value, Inert) or any(map(_holds_inert, parts))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain_tensors(entries: Mapping[Any, Any], path: Path, file_size: int) -> dict[str, Tensor]:
    """Return the tensors detached, or raise a MoepruneError that names all entries that are not plain."""
    odd = [f"`{name}` {flaw}" for name, entry in entries.items() if (flaw := _flaw(name, entry, file_size))]
    if odd:
        hint = "save `model.state_dict()` in floats of 16 bits or more, with nothing beside the tensors"
        raise MoepruneError(f"`{path}` has entries that are not plain tensors: {', '.join(sorted(odd))}", hint)
    if not entries:
        raise MoepruneError(f"`{path}` holds no tensors")
    return {name: Tensor.detach(tensor) for name, tensor in entries.items()}


def _flaw(name: Any, entry: Any, file_size: int) -> str | None:
    """Return why an entry is not a dense tensor on the CPU of a plain type, or None."""
    if not isinstance(name, str):
        return f"has a name of type {type(name).__name__}"
    if isinstance(entry, Inert):
        return f"is an object of `{entry.origin}`, which cannot be loaded without running code"
    if type(entry) not in (Tensor, torch.nn.Parameter):
        return f"is of type {type(entry).__name__}"
    if entry.device.type != "cpu":
        return f"has no values (device {entry.device.type})"
    if entry.layout != torch.strided:
        return f"is sparse ({entry.layout})"
    if entry.is_nested:
        return "is a nested tensor"
    if str(entry.dtype) not in PLAIN_TYPES:
        return f"has the type {entry.dtype}"
    if entry.numel() * entry.element_size() > file_size:
        return f"has the shape {list(entry.shape)}, larger than the whole file"
    return None


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    metadata: dict[str, Any] | None = None


def _index_in(folder: Path) -> Path:
    try:
        files = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise refused("read", folder, error) from None
    for suffix in INDEX_SUFFIXES:
        found = [name for name in files if name.endswith(suffix)]
        if len(found) > 1:
            raise MoepruneError(f"`{folder}` has several indexes: {_quoted(found)}", "give one of them")
        if found:
            return folder / found[0]
    expected = " or ".join(f"`*{suffix}`" for suffix in INDEX_SUFFIXES)
    raise MoepruneError(f"`{folder}` is a folder without an index {expected}", "give one of its files")


def _read_shards(path: Path) -> tuple[dict[Any, Any], tuple[Path, ...]]:
    """Return the entries of all shards of an index, in its order, and the files."""
    index: _Index = from_json(read_json(path, "the index of a sharded checkpoint"), _Index, f"index `{path}`")
    names = sorted(set(index.weight_map.values()))
    if outside := [name for name in names if not _is_below(name)]:
        hint = "put all shards into the folder of the index, or into folders within it"
        raise MoepruneError(f"`{path}` names shards that are not in its folder: {_quoted(outside)}", hint)
    shards = {name: path.parent / name for name in names}
    if missing := [name for name, shard in shards.items() if not os.path.exists(shard)]:  # noqa: PTH110
        raise MoepruneError(f"`{path}` names shards that are missing: {_quoted(missing)}", "fetch them too")
    parts = {name: _items(_read_entries(shard, _first_bytes(shard), None)) for name, shard in shards.items()}
    expected = set(index.weight_map.items())
    found = {(str(name), shard) for shard, part in parts.items() for name in part}
    problems = [f"missing `{name}` in `{shard}`" for name, shard in sorted(expected - found)]
    problems += [f"unexpected `{name}` in `{shard}`" for name, shard in sorted(found - expected)]
    if problems:
        hint = "index and shards are of different models or damaged; fetch or write them again, together"
        raise MoepruneError(f"`{path}` does not fit its shards: {'; '.join(problems)}", hint)
    entries = {name: parts[shard][name] for name, shard in index.weight_map.items()}
    size = sum(entry.numel() * entry.element_size() for entry in entries.values() if isinstance(entry, Tensor))
    total_size = (index.metadata or {}).get("total_size", size)
    if total_size != size:
        logger.warning(f"`{path}`: `total_size` is {total_size!r}, but the tensors have {size} bytes")
    return entries, (path, *shards.values())


def _is_below(text: str) -> bool:
    """Return True if a text names a file in a folder or in one of its folders, on any system."""
    windows = PureWindowsPath(text)
    is_inside = not (windows.drive or windows.root or ".." in windows.parts)
    return is_inside and text.isprintable() and PurePosixPath(text).as_posix() == text not in {"", "."}
