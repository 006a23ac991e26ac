"""Files that a command reads, which it never replaces; no torch."""

import contextlib
import json
import mimetypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.data.spec import IDX_FILES, IDX_IMAGES, SPECS_HINT, idx_labels, split_spec
from moeprune.errors import MoepruneError

INPUTS = ("checkpoint", "baseline", "analysis", "plan", "data", "config")
"""Options that name files or folders to read."""
MAX_PATH = 255  # bytes; longer ones the system refuses otherwise


def require_other_file(output: str, values: Mapping[str, Any]) -> None:
    """Raise a MoepruneError if an option's output is an input: it would be lost, so that `--force` does not help.

    values: of all options by name.
    """
    path, option = values.get(output), f"--{output.replace('_', '-')}"
    inputs = [Path(values[name]) for name in INPUTS if values.get(name) is not None]
    if (data := values.get("data")) is not None and (named := split_spec(data)):
        inputs.append(Path(named[0]))
    if path is not None and any(_reads(each, path) for each in inputs):
        raise MoepruneError(f"`{option} {path}` would replace a file that the command reads", "give another path")


def require_inputs(values: Mapping[str, Any]) -> None:
    """Raise a MoepruneError if nothing is where an option says that a file is, before torch is imported to read it.

    values: of all options by name.
    """
    for name in INPUTS:
        value = values.get(name)
        if value is None or (name == "data" and split_spec(value)):
            continue
        with contextlib.suppress(NotADirectoryError, ValueError):  # what reads it says what is wrong
            if not os.path.exists(value) and (not value or len(os.fsencode(value)) < MAX_PATH):  # noqa: PTH110
                if name == "data":
                    raise MoepruneError(f"no data `{value}`", SPECS_HINT)
                raise MoepruneError(f"no file `{value}`")


def _reads(path: Path, output: Path) -> bool:
    """Return True if reading a path (a file, an index, a folder of shards or of images) reads the output."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        if path.samefile(output):
            return True
        if path.is_dir():
            inside = output.is_file() and Path(os.path.realpath(path)) in Path(os.path.realpath(output)).parents
            is_image = (mimetypes.guess_type(output)[0] or "").startswith("image/") or IDX_FILES.fullmatch(output.name)
            return inside and bool(is_image or any(_reads(index, output) for index in path.glob("*.index.json")))
        if IDX_IMAGES.fullmatch(path.name) and (labels := idx_labels(path)):
            return labels.samefile(output)
        if path.suffix == ".json":
            shards = json.loads(path.read_bytes())["weight_map"].values()
            return any((path.parent / shard).exists() and (path.parent / shard).samefile(output) for shard in shards)
    return False
