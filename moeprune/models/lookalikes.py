"""A guess at the contents of an unknown file, from the names of its tensors; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

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


def lookalike(names: Collection[str]) -> str:
    """Return in words what a file of no known library is."""
    has_experts = any(re.search(r"experts?[._/]|(^|[./])experts?$", name) for name in names)
    for pattern, kind in KINDS:
        found = next((name for name in sorted(names) if re.search(pattern, name)), None)
        if found is not None and has_experts >= ("top-k" in kind):
            return f"`{found}` belongs to {kind}"
    return f"none of its {len(names)} tensors matches a known layout"
