"""FLOPs for one input, by part. 1 multiply-add = 2 FLOPs; matrix products alone are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Usage(NamedTuple):
    """Mean numbers of experts for one input of a routed layer."""

    running: float  # experts that run
    applied: float  # experts whose router weights are applied, also where they are zero


@dataclass(frozen=True)
class Flops:
    """FLOPs for one input."""

    experts: int = 0  # the experts' MLPs
    routing: int = 0  # router logits, dispatch and combine
    compensation: int = 0
    other: int = 0  # the rest of the model

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())

    def __add__(self, more: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(vars(self).values(), vars(more).values(), strict=True)))
