"""Second moments of what the last linears of experts take, for choosing among hidden units.

Expert j adds R_j = Σ_p w_jp·(z_jp·Wᵀ + b) to each token's output, so that with r = Σ_p w_jp·z_jp and s = Σ_p w_jp the
squared change of R_j by other weights is known from Σ r·rᵀ, Σ s·r and Σ s², summed over tokens.

Products are in float32, the sums of batches wide.

Axes: b inputs, m tokens, e experts, p terms per expert, h hidden width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.calibration.sums import wide_dtype
from moeprune.calibration.walk import Stage
from moeprune.layers.layer import MoELayer


class UnitMoments(NamedTuple):
    """Sums over tokens for some experts."""

    power: Tensor  # of r·rᵀ (e,h,h)
    sums: Tensor  # of s·r (e,h)
    weight: Tensor  # of s² (e)

    def __add__(self, more: UnitMoments) -> UnitMoments:  # type: ignore[override]
        return UnitMoments(*(one + other for one, other in zip(self, more, strict=True)))

    def select(self, experts: Tensor) -> UnitMoments:
        """Return those of some of the experts."""
        return UnitMoments(*(part[experts] for part in self))

    def in_float64(self) -> UnitMoments:
        """Return them in float64, on the CPU where the device has none."""
        device = self.power.device if self.power.dtype == torch.float64 else "cpu"
        return UnitMoments(*(part.to(device, torch.float64) for part in self))

    @property
    def mean(self) -> Tensor:
        """The mean of z that a bias can make up for (e,h)."""
        return self.sums / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)[:, None]

    def around(self, point: Tensor) -> Tensor:
        """Return Σ (r - s·c)·(r - s·c)ᵀ (e,h,h) for a point c (e,h)."""
        across = self.sums[:, :, None] * point[:, None]
        return self.power - across - across.mT + self.weight[:, None, None] * point[:, :, None] * point[:, None]


def measure_units(
    stage: Stage, layer: MoELayer, experts: range, near_means: bool
) -> tuple[tuple[UnitMoments, UnitMoments], Tensor]:
    """Return the moments of some of a layer's experts on either half of the inputs.

    layer: observed in place of the stage's. near_means: they are of the differences of z from points near their means:
    in float32 variances that are small beside the means would otherwise be lost. Returns these points, too (e,h);
    zeros without. All in float64.
    """
    weight = layer.fc2_weight
    near = None if near_means else weight.new_zeros(len(experts), weight.shape[2], dtype=torch.float32)
    found: list[UnitMoments | None] = [None, None]
    for members, seen, _ in stage.observe(layer):
        for which, places in enumerate(members):
            if not len(places):
                continue
            near, sums = seen.select(places).hidden_moments(experts, near)
            moments, known = UnitMoments(*(part.to(wide_dtype(weight.device)) for part in sums)), found[which]
            found[which] = moments if known is None else known + moments
    first, second = found
    if first is None or second is None:  # one input
        first = second = first or second
    assert first is not None
    assert second is not None
    assert near is not None
    halves = first.in_float64(), second.in_float64()
    return halves, near.to(halves[0].sums)
