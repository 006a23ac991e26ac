"""The bytes of a folder whose layers are pruned alike, known before it is written; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from moeprune.layers.interface import LayerConfig
from moeprune.models.folders.layout import ModelFolder


class PrunedBytes:
    """Bytes of all tensors of a folder with fewer or narrower experts, in the types that they have there.

    layers: by their names in the folder.
    """

    def __init__(self, folder: ModelFolder, layers: Mapping[str, LayerConfig]):
        self.full, self.num_experts, self.layers = folder.cost().bytes, folder.num_experts, layers
        self.experts = {name: layer.bytes for name, layer in folder.layers.items()}
        self.routers = sum(
            info.nbytes
            for layer in folder.layers.values()
            for name, (role, info) in layer.whole.items()
            if role.part == "router" and folder.cut(name, role, info) is not None
        )
        self.left_out = 0
        if folder.dropped:
            tensors = (each for header in folder.headers() for each in header.tensors.items())
            self.left_out = sum(info.nbytes for name, info in tensors if folder.is_dropped(name))

    def of(self, k: int, width: int | None) -> int:
        """Return the bytes with k experts of so many hidden units in each layer; None: of all of them."""
        if k == self.num_experts and width is None:
            return self.full
        kept, lost = Fraction(k, self.num_experts), Fraction(0)
        for name, experts in self.experts.items():
            lost += experts * (1 - kept * _share(self.layers[name], width))
        return math.ceil(self.full - self.left_out - lost - self.routers * (1 - kept))


def _share(layer: LayerConfig, width: int | None) -> Fraction:
    """Return the share of an expert's weights that is left with so many hidden units."""
    narrow, whole = (sum(map(math.prod, each.expert_shapes(1).values())) for each in (layer.with_width(width), layer))
    return Fraction(narrow, whole)
