"""Files that look like a Soft MoE and are none, told by the names of their tensors; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable

_ROUTER = re.compile(r"(^|[./])(router|gates?|gating|w_gat(e|ing)|wg)([./]|$)")
_EXPERT = re.compile(r"experts?[._/]|(^|[./])experts?$")
_X_TRANSFORMERS = re.compile(r"(^|\.)attn_layers\.layers\.\d+\.\d+\.")
_VIT_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.attn\.qkv\.weight$")
_OURS = re.compile(r"(^|\.)soft_moe\.phi$")
_PHI = re.compile(r"(^|\.)phi$")
_LAYERS = {
    "soft-moe-pytorch": re.compile(r"(^|\.)(slot_embeds|to_slot_embeds\.0\.weight)$"),
    "soft-mixture-of-experts": re.compile(r"(^|\.)moe\.experts\.weight$"),
}


def lookalike(names: Iterable[str]) -> str | None:
    """In words what a file of no known library is, or None where that is unknown."""
    names = sorted(names)
    if ours := _first(_OURS, names):
        return f"`{ours}` is of a checkpoint of moeprune that has lost its metadata `moeprune`"
    for library, pattern in _LAYERS.items():
        if tensor := _first(pattern, names):
            return (
                f"`{tensor}` is of a layer of {library} inside a model that its tensors do not tell: say what"
                " builds it with `--model package.module:function` and `--input-shape`"
            )
    if phi := _first(_PHI, names):
        return (
            f"`{phi}` may be a Soft MoE layer inside a model that moeprune does not know (say what builds it"
            " with `--model package.module:function`), or in a file that lacks part of its model"
        )
    router, experts = _first(_ROUTER, names), _first(_EXPERT, names)
    if router and experts:
        return (
            f"`{router}` beside `{experts}` is a router that picks experts for each token (top-k), whose"
            " experts are not soft"
        )
    if layer := _first(_X_TRANSFORMERS, names):
        return f"`{layer}` is of a transformer of `x-transformers`, which has no experts"
    if not experts and (block := _first(_VIT_BLOCK, names)):
        return f"`{block}` is of a vision transformer of `timm` without experts"
    return None


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if pattern.search(name)), None)
