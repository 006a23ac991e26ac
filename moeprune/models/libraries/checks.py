"""Whether a file has the tensors of a layout, and no others; no torch."""

from __future__ import annotations

from collections.abc import Iterable

from moeprune.errors import MoepruneError
from moeprune.files.header import FLOATS
from moeprune.models.libraries.interface import Entry, Tensors


def require_entries(tensors: Tensors, entries: Iterable[Entry], path: str) -> None:
    """Raise a MoepruneError that lists all missing and unexpected tensors, shapes that contradict another
    tensor's, and types other than floats.
    """
    expected = {name: entry for entry in entries for name in entry.theirs}
    problems = [f"missing `{name}`" for name in sorted(set(expected) - set(tensors))]
    problems += [f"unexpected `{name}`" for name in sorted(set(tensors) - set(expected))]
    for name in sorted(set(expected) & set(tensors)):
        entry, found = expected[name], tensors[name]
        if found.shape != entry.shape:
            problems.append(f"`{name}` is {list(found.shape)}, expected {list(entry.shape)}")
            if entry.like in tensors and entry.like != name:
                problems[-1] += f" as `{entry.like}` is {list(tensors[entry.like].shape)}"
        if found.dtype not in FLOATS:
            problems.append(f"`{name}` has the type {found.dtype}, expected floats")
    if problems:
        raise MoepruneError(f"the tensors of `{path}` are not those of a whole model: {'; '.join(problems)}")
