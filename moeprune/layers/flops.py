"""FLOPs for one input, by part. 1 multiply-add = 2 FLOPs; matrix products alone are counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple


class Usage(NamedTuple):
    """Mean numbers of experts for one input of a routed layer.

    running: experts that run. applied: experts whose router weights are applied, also where they are zero.
    """

    running: float
    applied: float


@dataclass(frozen=True)
class Flops:
    """FLOPs for one input.

    experts: the experts' MLPs. routing: router logits, dispatch and combine. compensation: the
    combine product with surrogates. other: the rest of the model.
    """

    experts: int = 0
    routing: int = 0
    compensation: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.experts + self.routing + self.compensation + self.other

    def __add__(self, more: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(asdict(self).values(), asdict(more).values(), strict=True)))
