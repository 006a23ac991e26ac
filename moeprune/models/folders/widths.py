"""The keys of `config.json` that make routed experts, and nothing else, narrower: found by trying."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moeprune.errors import MoepruneError, listed
from moeprune.models.folders.layout import CONFIG, ModelFolder, changed_config

WIDTHS = re.compile(r"intermediate|ffn")
"""What the key of a width has in its name."""
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""Keys of the number of shared experts; where their width is this number of routed ones, it takes up the change."""

Shapes = Mapping[str, Sequence[int]]


def keys_of_width(
    folder: ModelFolder, full: int, width: int, blocks: Sequence[str], shapes: Callable[[dict[str, Any]], Shapes]
) -> dict[str, int]:
    """Return the keys of the language config with which experts have a width, and their values.

    Args:
        full: the width that they have.
        blocks: the names of MoE layers in the model.
        shapes: returns those of the model's tensors by name, for a config.

    Raises a MoepruneError if no key changes experts, or those that do change other tensors too.
    """
    if width == full:
        return {}
    before, others = shapes(folder.config), dict[str, list[str]]()
    for changes in _candidates(folder.language, full, width):
        after = shapes(changed_config(folder, changes))
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        of_experts = {name for name in changed if any(name.startswith(f"{block}.experts.") for block in blocks)}
        if not all(any(name.startswith(f"{block}.experts.") for name in of_experts) for block in blocks):
            continue
        if changed == of_experts:
            return changes
        others.setdefault(next(iter(changes)), sorted(changed - of_experts))
    for key, names in others.items():
        message = f"`{key}` in `{folder.path / CONFIG}` is the width of {listed(names, 2)} too, which keep theirs"
        number = next((folder.language[name] for name in SHARED if folder.language.get(name)), None)
        divisor = f"give a `--width` by which {number * full} can be divided, or" if number else "give"
        raise MoepruneError(message, f"{divisor} `--keep` alone, to drop experts")
    message = f"`{folder.path / CONFIG}` states the width of experts, {full}, under no key that moeprune knows"
    raise MoepruneError(message, "leave `--width` out")


def _candidates(language: Mapping[str, Any], full: int, width: int) -> Iterator[dict[str, int]]:
    """Yield changes of the config, those of fewer keys first."""
    keys = [key for key, value in language.items() if WIDTHS.search(key) and type(value) is int and value == full]
    yield from ({key: width} for key in keys)
    for number in SHARED:
        shared = language.get(number)
        if type(shared) is int and shared > 0 and shared * full % width == 0:
            yield from ({key: width, number: shared * full // width} for key in keys)
