"""Files of `torch.save`, loaded without running any code from them.

The restricted unpickler of torch (`weights_only=True`) does the loading. For what it does not know, such as the
`args` of a training script beside its weights, it is given inert classes, which keep nothing and do nothing.
"""

from __future__ import annotations

import builtins
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from moeprune.errors import MoepruneError

SAFE_WAY = (
    "moeprune runs no code from a file. If you trust the file, load it with"
    " `found = torch.load(FILE, map_location='cpu', weights_only=False)` and save the tensors alone:"
    " `torch.save(found['state_dict'], NEW)`, or whichever entry holds them, or, if it is a whole model,"
    " `torch.save(found.state_dict(), NEW)`"
)
WRITE_AGAIN = "a file cut off by a full disk or a broken transfer must be written again"
MAX_CLASSES = 200  # that torch does not know, in one file


class Inert:
    """Takes the place of an object of another class; origin: the name of that class in the file."""

    origin: str

    def __new__(cls, *_: Any) -> Any:
        """Ignore the arguments."""
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        """Ignore the state."""


def load_torch(path: Path, start: bytes) -> Any:
    """Load a file of `torch.save`; objects of classes that torch does not know become `Inert`.

    Of their contents only the entries of dicts and lists are kept, as an OrderedDict or a list. Raises a MoepruneError
    if that takes more than the restricted unpickler of torch.

    Args:
        start: the first bytes of the file.
    """
    kinds: list[type[Inert]] = []  # in the place of classes, in the order in which the file needs them
    while True:
        try:
            return _load(path, start, kinds)
        except Exception as error:  # a damaged file can make the unpickler raise anything
            if not _helped(kinds, str(_cause(error))):
                raise _refusal(path, start, kinds, error) from None


def needs_code(path: Path, origin: str) -> MoepruneError:
    """Return the error of a file whose weights are within an object of a class of its own."""
    why = "files look like this if they hold a whole model instead of its state dict, or objects among the weights"
    return MoepruneError(
        f"`{path}` cannot be loaded without running code: it contains `{origin}`", f"{why}. {SAFE_WAY}"
    )


def _load(path: Path, start: bytes, kinds: list[type[Inert]]) -> Any:
    is_zip = start.startswith(b"PK\3\4")
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if "/code/" not in record.filename]
        if all(record.filename.endswith(".npy") for record in records):
            raise RuntimeError("it is an archive of NumPy arrays")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            # The weights cannot be mapped, and a few bytes could grow to fill the memory.
            raise RuntimeError("it was compressed after `torch.save`, which does not compress")
    known = torch.serialization.safe_globals([(kind, kind.origin) for kind in kinds])
    with known, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _helped(kinds: list[type[Inert]], reason: str) -> bool:
    """Provide another inert class for what stopped the unpickler; return False if none can help."""
    if match := re.search(r"Unsupported global: GLOBAL (.+?) was not an allowed global", reason):
        origin = match[1] if "." in match[1] else f"builtins.{match[1]}"
        known = {kind.origin for kind in kinds}
        module, _, name = origin.rpartition(".")
        is_function = module == "builtins" and not isinstance(getattr(builtins, name, None), type)
        if origin in known or len(known) >= MAX_CLASSES or (is_function and name != "getattr"):
            return False
        kinds.append(_inert(f"Inert{len(kinds)}", origin))
        return True
    if match := re.search(r"Can only (SETITEM|APPEND|extend|append).*\bInert(\d+)'>", reason):
        index, make = int(match[2]), OrderedDict if match[1] == "SETITEM" else list  # of which it is a subclass
        kinds[index] = _inert(f"Made{index}", kinds[index].origin, __new__=lambda _, *__: make())
        return True
    return False


def _inert(name: str, origin: str, **methods: Any) -> type[Inert]:
    return type(name, (Inert,), {"origin": origin, **methods})


def _cause(error: Exception) -> BaseException:
    return (isinstance(error, pickle.UnpicklingError) and error.__context__) or error


def _refusal(path: Path, start: bytes, kinds: list[type[Inert]], error: Exception) -> MoepruneError:
    """Return the error of a file that `torch.load` refused, by the reason that it gave."""
    cause = re.sub(r"\b(?:Inert|Made)(\d+)", lambda match: kinds[int(match[1])].origin, str(_cause(error)).strip())
    if match := re.search(r"GLOBAL (\S+)", cause):
        return needs_code(path, match[1])
    if "TorchScript archives" in cause:
        message = f"`{path}` is a TorchScript archive (`torch.jit.save`): a program, not only tensors"
        way = "`torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), NEW)`"
        return MoepruneError(message, f"if you trust it, save the tensors alone: {way}")
    if "archive of NumPy arrays" in cause:
        message = f"`{path}` is an archive of NumPy arrays (`.npz`), not a checkpoint"
        return MoepruneError(message, "if it holds data, give it with `--data`; save weights with `torch.save`")
    if start.startswith(b"version https://git-lfs"):
        return MoepruneError(f"`{path}` is a pointer of Git LFS, not the file itself", "run `git lfs pull`")
    reason = f"{type(_cause(error)).__name__}: {cause}".split("\n")[0][:200]
    if start.startswith(b"PK") and not (kinds or isinstance(error, pickle.UnpicklingError)):
        return MoepruneError(f"`{path}` is a zip file that torch cannot load ({reason})", WRITE_AGAIN)
    if start.startswith((b"PK", b"\x80")) or "tar format" in cause:
        message = f"`{path}` is damaged, or cannot be loaded without running code ({reason})"
        return MoepruneError(message, SAFE_WAY)
    message = f"`{path}` is not a checkpoint, or a truncated one: it starts with {start[:16]!r}"
    return MoepruneError(f"{message}, as no safetensors file, index or torch file does", WRITE_AGAIN)
