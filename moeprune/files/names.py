"""Names of tensors in files: what wrappers, trainers and averages put around those of a model; no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moeprune.errors import MoepruneError

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that DataParallel and averages, torch.compile, FSDP and activation checkpointing add."""
COUNTERS = re.compile(r"(n_averaged|initted|step)|(.+\.)?(total_ops|total_params)")
"""Names of tensors that averages of weights keep beside them, and that profilers leave in every module."""
_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")


class View(NamedTuple):
    """A model in a file: some of its tensors, by shorter names.

    names: in the file, by the names in the model. prefix: taken off the front of all. wrappers: parts that were taken
    off anywhere else. dropped: names of the other tensors of the file.
    """

    names: dict[str, str]
    prefix: str
    wrappers: list[str]
    dropped: list[str]


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers added."""
    return _WRAPPERS.sub("", name)


def as_they_are(names: Iterable[str]) -> View:
    """Return all tensors by their own names."""
    return View({name: name for name in names}, "", [], [])


def views(
    names: Collection[str],
    is_known: Callable[[str], Any],
    least: int,
    stated: str | None,
    path: object,
    kept: Collection[str] = (),
) -> list[View]:
    """Return a view of the tensors under each prefix at which a model may start, without the parts of wrappers.

    What is under a longer one of these prefixes is not part of a shorter one's model. Without any, all tensors are
    in view. Raises a MoepruneError if no tensor has the prefix that the user gives.

    Args:
        names: of all tensors of a file.
        is_known: True for a name that a tensor of the model may have.
        least: tensors with such names that a model has.
        stated: the prefix, if the user gives it; then only its view is returned.
        path: of the file, for errors.
        kept: names that are left out as counters of wrappers if they are not among these.
    """
    plain = {unwrapped(name): name for name in names}
    if len(plain) < len(names):  # two tensors would have one name
        plain = {name: name for name in names}
    counts = Counter(name.removesuffix(end) for name in plain for end in _ends(name) if is_known(end))
    prefixes = sorted(prefix for prefix, count in counts.items() if count >= least)
    if stated is None:
        wanted = prefixes or [""]
    else:
        full = f"{stated.rstrip('.')}." if stated else ""
        wanted = [full if any(name.startswith(full) for name in plain) else unwrapped(full)]
    found = [_view(plain, prefix, prefixes, kept) for prefix in wanted]
    if stated is not None and not found[0].names:
        known = ", ".join(f"`{prefix}`" for prefix in prefixes) or "no prefix"
        raise MoepruneError(f"no tensor of `{path}` has the prefix `{stated}`", f"models start at {known}")
    return found


def _view(plain: Mapping[str, str], prefix: str, prefixes: Iterable[str], kept: Collection[str]) -> View:
    inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    under = [name for name in plain if name.startswith(prefix) and not name.startswith(inner)]
    taken = {name.removeprefix(prefix): plain[name] for name in under}
    taken = {name: raw for name, raw in taken.items() if name in kept or not COUNTERS.fullmatch(name)}
    removed = {part for raw in taken.values() for part in raw.split(".")} - {
        part for name in (prefix, *taken) for part in name.split(".")
    }
    dropped = sorted(set(plain.values()) - set(taken.values()))
    return View(taken, prefix, [part for part in WRAPPERS if part in removed], dropped)


def _ends(name: str) -> Iterator[str]:
    """Yield a name and each of its ends that starts after a point."""
    yield name
    yield from (name[match.end() :] for match in re.finditer(r"\.", name))
