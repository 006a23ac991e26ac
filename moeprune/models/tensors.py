"""Checks of tensors by name, shape and type, and a guess at what unknown ones are; no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.files.header import FLOATS, TensorInfo
from moeprune.layers.interface import Shapes

KINDS = (
    (r"(^|\.)soft_moe\.phi$", "a checkpoint of moeprune that has lost its metadata `moeprune`"),
    (r"(^|\.)(slot_embeds|to_slot_embeds\.0\.weight)$", "a layer of soft-moe-pytorch, in a model of other code"),
    (r"(^|\.)moe\.experts\.weight$", "a layer of soft-mixture-of-experts, in a model of other code"),
    (r"(^|\.)phi$", "a Soft MoE layer, in an unknown model or a part of one"),
    (r"(^|[./])(router|gates?|gating|w_gat(e|ing)|wg)([./]|$)", "a router that picks experts (top-k)"),
    (r"(^|\.)attn_layers\.layers\.\d+\.\d+\.", "a transformer of `x-transformers`, which has no experts"),
    (r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$", "a vision transformer of `timm` without experts"),
)
"""Patterns of a tensor's name and what such a tensor belongs to, the most specific first."""


def require_tensors(
    found: Mapping[str, TensorInfo],
    expected: Shapes,
    what: str,
    hint: str | None = None,
    integers: Collection[str] = (),
) -> None:
    """Raise a MoepruneError that begins with `what` and lists all missing and unexpected tensors, wrong shapes and
    types; all are floats but `integers`.
    """
    problems = [f"missing `{name}`" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected `{name}`" for name in sorted(set(found) - set(expected))]
    for name in sorted(set(found) & set(expected)):
        shape, dtype = found[name].shape, found[name].dtype
        if shape != expected[name]:
            problems.append(f"`{name}` is {list(shape)}, expected {list(expected[name])}")
        if (dtype in FLOATS) == (name in integers):
            kind = "integers" if name in integers else "floats"
            problems.append(f"`{name}` has the type {dtype}, expected {kind}")
    if problems:
        raise MoepruneError(f"{what}: {'; '.join(problems)}", hint)


def require_one_type(tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Raise a MoepruneError that names the tensors whose type is not that of most of them.

    Scores (`score_weights`) are float32, whatever the type of the weights is.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("score_weights")}
    [(usual, _)] = Counter(tensor.dtype for tensor in weights.values()).most_common(1)
    if odd := [f"`{name}` is {t.dtype}" for name, t in sorted(weights.items()) if t.dtype != usual]:
        raise MoepruneError(
            f"`{path}` has tensors of several types: {', '.join(odd)}, the others are {usual}",
            "convert the model to one type, for example with `model.float()`",
        )


def lookalike(names: Collection[str]) -> str:
    """Return in words what a file of no known library is."""
    has_experts = any(re.search(r"experts?[._/]|(^|[./])experts?$", name) for name in names)
    for pattern, kind in KINDS:
        found = next((name for name in sorted(names) if re.search(pattern, name)), None)
        if found is not None and has_experts >= ("top-k" in kind):
            return f"`{found}` belongs to {kind}"
    return f"none of its {len(names)} tensors matches a known layout"
