"""Values of one forward pass of a layer whose tokens choose experts: only rows of a token and one of its experts.

Axes: b inputs, m tokens, d width of the input, o width of the output, n experts, k of them chosen for each token, r
rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.layers.observation import Observation


class Rows(NamedTuple):
    """Tokens and one of their experts each, sorted by expert."""

    tokens: Tensor  # of b·m (r)
    pairs: Tensor  # of b·m·k (r)
    counts: list[int]  # rows of each expert

    @classmethod
    def sorted(cls, chosen: Tensor, num_experts: int) -> Rows:
        """Return the rows of chosen experts (b·m,k)."""
        flat = chosen.flatten()
        pairs = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_experts).tolist()
        return cls(pairs // max(1, chosen.shape[1]), pairs, counts)

    def of_experts(self, first: int, count: int) -> Rows:
        """Return the rows of some consecutive experts."""
        counts = self.counts[first : first + count]
        start = sum(self.counts[:first])
        rows = slice(start, start + sum(counts))
        return Rows(self.tokens[rows], self.pairs[rows], counts)

    def where(self, is_kept: Tensor) -> Rows:
        """Return some of the rows, by a mask (r)."""
        counts = self.experts[is_kept].bincount(minlength=len(self.counts)).tolist()
        return Rows(self.tokens[is_kept], self.pairs[is_kept], counts)

    @property
    def experts(self) -> Tensor:
        """The expert of each row (r)."""
        counts = torch.tensor(self.counts, device=self.tokens.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(self.tokens))


@dataclass(frozen=True)
class RoutedRows(Observation):
    """One forward pass; `term_outputs` are of rows (r,o)."""

    rows: Rows = field(kw_only=True)  # of experts that have weights
    row_hidden: Callable[[Tensor, list[int]], Tensor] = field(kw_only=True)  # what the last linears take (r,h) of rows
    row_weights: Tensor = field(kw_only=True)  # (r)
    row_gates: Tensor | None = field(kw_only=True)  # that multiply what experts take (r); None: 1
