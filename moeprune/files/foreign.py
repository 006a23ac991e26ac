"""Checkpoints that other programs wrote, read as a plain dict of tensors.

A file is recognised by its contents, not its suffix, and no code in it is ever run.
"""

import codecs
import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from moeprune.errors import MoepruneError
from moeprune.files import checkpoint
from moeprune.files.disk import read_json, refused, require_file, version_of
from moeprune.files.header import DTYPES, METADATA_KEY, Header, is_safetensors, read_header, read_metadata
from moeprune.records import from_json

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".safetensors.index.json"
STATE_DICT_KEYS = (
    "state_dict", "model", "model_state_dict", "model_ema", "ema", "state_dict_ema", "module", "net",
    "network",
)  # fmt: skip
"""Keys under which training checkpoints keep their weights, one or two levels deep."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DistributedDataParallel, torch.compile and Lightning add to all names."""
PLAIN_TYPES = {name for name, _ in DTYPES.values() if not re.search("float8|complex", name)}
SAFE_WAY = (
    "moeprune runs no code from a file. If you trust the file, load it with"
    " `found = torch.load(FILE, map_location='cpu', weights_only=False)` and save the tensors alone:"
    " `torch.save(found['state_dict'], NEW)`, or whichever entry holds them, or, if it is a whole model,"
    " `torch.save(found.state_dict(), NEW)`"
)
WRITE_AGAIN = "a file cut off by a full disk or a broken transfer must be written again"


@dataclass(frozen=True)
class StateDict:
    """The tensors of a foreign checkpoint by name, in the order of the file, and the files that were read.

    The tensors are on the CPU, detached, of the file's own types, and memory-mapped, unless the file has torch's
    legacy format. They may be views that share memory. Names are without PREFIXES.
    """

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]

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
        path: a file, or a folder with one `*.safetensors.index.json`.
        key: the entry of a training checkpoint to take, such as `model_ema` or `model.state_dict`. Needed if several
            entries hold tensors.
    """
    path = Path(path)
    file = _index_in(path) if os.path.isdir(path) else path  # noqa: PTH112 (Path.is_dir fails for long names)
    require_file(file, "a checkpoint")
    try:
        with file.open("rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise refused("read", file, error) from None
    entries: Mapping[Any, Any]
    files: tuple[Path, ...] = (file,)
    is_index = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
    if not is_safetensors(file) and not is_index:
        entries = _find_state_dict(_load(file, start), key, file)
    elif key is not None:
        raise MoepruneError(f"`{path}` has no key `{key}`: safetensors files hold no entries", "omit the key")
    elif is_index:
        entries, files = _read_shards(file)
    else:
        entries = checkpoint.read_tensors(read_header(file))
    tensors = _plain_tensors(entries, path, sum(part.stat().st_size for part in files))
    prefix = _common_prefix(tensors)
    return StateDict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, files)


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


def _load(path: Path, start: bytes) -> Any:
    """Load a torch file without running any code from it."""
    is_zip = start.startswith(b"PK\3\4")
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                records = [record for record in archive.infolist() if "/code/" not in record.filename]
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                # The weights cannot be mapped, and a few bytes could grow to fill the memory.
                raise RuntimeError("it was compressed after `torch.save`, which does not compress")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise _refusal(path, start, error) from None


def _refusal(path: Path, start: bytes, error: Exception) -> MoepruneError:
    """Return the error of a file that `torch.load` refused, by the reason that it gave."""
    cause = (isinstance(error, pickle.UnpicklingError) and error.__context__) or error
    if match := re.search(r"GLOBAL (\S+)", str(cause)):
        message = f"`{path}` cannot be loaded without running code: it contains `{match[1]}`"
        why = "training checkpoints look like this if they hold objects such as `args`, `config` or numpy"
        why += " numbers beside the weights, or a whole model instead of its state dict"
        return MoepruneError(message, f"{why}. {SAFE_WAY}")
    if "TorchScript archives" in str(cause):
        message = f"`{path}` is a TorchScript archive (`torch.jit.save`): a program, not only tensors"
        way = "`torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW)`"
        return MoepruneError(message, f"if you trust it, save the tensors alone: {way}")
    if start.startswith(b"version https://git-lfs"):
        return MoepruneError(f"`{path}` is a pointer of Git LFS, not the file itself", "run `git lfs pull`")
    reason = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0][:200]
    if start.startswith(b"PK") and not isinstance(error, pickle.UnpicklingError):
        return MoepruneError(f"`{path}` is a zip file that torch cannot load ({reason})", WRITE_AGAIN)
    if start.startswith((b"PK", b"\x80")) or "tar format" in str(cause):
        message = f"`{path}` is damaged, or cannot be loaded without running code ({reason})"
        return MoepruneError(message, SAFE_WAY)
    message = f"`{path}` is not a checkpoint, or a truncated one: it starts with {start[:16]!r}"
    return MoepruneError(f"{message}, as no safetensors file, index or torch file does", WRITE_AGAIN)


def _find_state_dict(loaded: Any, key: str | None, path: Path) -> dict[Any, Any]:
    """Return the one dict of a training checkpoint that holds tensors."""
    found = dict(_state_dicts(loaded))
    start = key or ""
    inside = [name for name in found if name == start or _is_within(name, start)]
    known = [name for name in inside if {*name.removeprefix(start).split(".")} <= {"", *STATE_DICT_KEYS}]
    known = [name for name in known if not any(_is_within(other, name) for other in known)]
    if len(known) == 1:
        return found[known[0]]
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
    # An OrderedDict from a file may carry its own attribute `items`.
    entries = dict(dict.items(value)) if isinstance(value, dict) else {}
    if any(isinstance(entry, Tensor) for entry in entries.values()):
        yield key, entries
    for name, entry in entries.items() if depth else ():
        if isinstance(name, str):
            yield from _state_dicts(entry, f"{key}.{name}" if key else name, depth - 1)


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


def _common_prefix(names: Iterable[str]) -> str:
    """Return the prefix that wrappers, in any nesting, added to all names."""
    names, found = list(names), ""
    while prefix := next((p for p in PREFIXES if all(n.startswith(found + p) for n in names)), None):
        found += prefix
    return "" if found in names else found


class _Index(msgspec.Struct):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    metadata: dict[str, Any] | None = None


def _index_in(folder: Path) -> Path:
    try:
        found = sorted(file.name for file in folder.iterdir() if file.name.endswith(INDEX_SUFFIX))
    except OSError as error:
        raise refused("read", folder, error) from None
    if len(found) > 1:
        raise MoepruneError(f"`{folder}` has several indexes: {_quoted(found)}", "give one of them")
    if not found:
        raise MoepruneError(f"`{folder}` is a folder without an index `*{INDEX_SUFFIX}`", "give one of its files")
    return folder / found[0]


def _read_shards(path: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Return the tensors of all shards of an index, in its order, and the files."""
    index: _Index = from_json(read_json(path, "the index of a sharded checkpoint"), _Index, f"index `{path}`")
    names = sorted(set(index.weight_map.values()))
    if outside := [name for name in names if not _is_file_name(name)]:
        hint = "put all shards into the folder of the index, and name them without a folder"
        raise MoepruneError(f"`{path}` names shards that are not beside it: {_quoted(outside)}", hint)
    shards = {name: path.parent / name for name in names}
    if missing := [name for name, shard in shards.items() if not os.path.exists(shard)]:  # noqa: PTH110
        raise MoepruneError(f"`{path}` names shards that are missing: {_quoted(missing)}", "fetch them too")
    headers = {name: read_header(shard) for name, shard in shards.items()}
    expected = set(index.weight_map.items())
    found = {(name, shard) for shard, header in headers.items() for name in header.tensors}
    problems = [f"missing `{name}` in `{shard}`" for name, shard in sorted(expected - found)]
    problems += [f"unexpected `{name}` in `{shard}`" for name, shard in sorted(found - expected)]
    if problems:
        hint = "index and shards are of different models or damaged; fetch or write them again, together"
        raise MoepruneError(f"`{path}` does not fit its shards: {'; '.join(problems)}", hint)
    size = sum(tensor.nbytes for header in headers.values() for tensor in header.tensors.values())
    total_size = (index.metadata or {}).get("total_size", size)
    if total_size != size:
        logger.warning(f"`{path}`: `total_size` is {total_size!r}, but the tensors have {size} bytes")
    tensors = {name: checkpoint.read_tensors(header) for name, header in headers.items()}
    return {name: tensors[shard][name] for name, shard in index.weight_map.items()}, (path, *shards.values())


def _is_file_name(text: str) -> bool:
    """Return True if a text names a file without a folder, on any system."""
    same = PurePosixPath(text).name == PureWindowsPath(text).name == text
    return same and text not in {"", ".."} and text.isprintable()
