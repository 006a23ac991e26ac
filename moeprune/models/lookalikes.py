"""A guess at the contents of an unknown file, from the names of its tensors; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

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


def lookalike(names: Collection[str]) -> str:
    """Describe the probable contents of a file of no known library."""
    if ours := _first(_OURS, names):
        return f"`{ours}` belongs to a checkpoint of moeprune that has lost its metadata `moeprune`"
    for library, pattern in _LAYERS.items():
        if tensor := _first(pattern, names):
            return f"`{tensor}` belongs to a layer of {library}, in a model that only its own code can build"
    if phi := _first(_PHI, names):
        return f"`{phi}` may belong to a Soft MoE layer, in an unknown model or in a part of a model"
    router, experts = _first(_ROUTER, names), _first(_EXPERT, names)
    if router and experts:
        return f"`{router}` and `{experts}` belong to experts that a router picks for each token (top-k)"
    if layer := _first(_X_TRANSFORMERS, names):
        return f"`{layer}` belongs to a transformer of `x-transformers`, which has no experts"
    if not experts and (block := _first(_VIT_BLOCK, names)):
        return f"`{block}` belongs to a vision transformer of `timm` without experts"
    return f"none of its {len(names)} tensors matches a known layout"


def _first(pattern: re.Pattern[str], names: Collection[str]) -> str | None:
    return next((name for name in sorted(names) if pattern.search(name)), None)
