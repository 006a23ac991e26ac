"""Values of one forward pass of a layer whose tokens choose experts: only rows of a token and one of its experts.

Row i adds w_i·f_i to the output of its token: R_j of an expert j is the sum over its rows.

Axes: b inputs, m tokens, t = b·m, d width of the input, h hidden width of an expert, o width of the output, n experts,
r rows, sorted by expert, q regressors, s directions of the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moeprune.layers.observation import WORKSPACE, Observation, weighted_moments


class Rows(NamedTuple):
    """Tokens and one of their experts each, sorted by expert."""

    tokens: Tensor  # of t (r)
    pairs: Tensor  # of all choices of all tokens (r)
    counts: list[int]  # rows of each expert

    @classmethod
    def sorted(cls, chosen: Tensor, num_experts: int) -> Rows:
        """Return the rows of chosen experts (t,k)."""
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
        counts = torch.tensor(self.counts, dtype=torch.int64, device=self.tokens.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(self.tokens))

    def common(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield each two experts that have tokens in common, and the rows of these tokens, of either expert."""
        order, e = self.tokens.argsort(stable=True), len(self.counts)  # by token, then by expert
        tokens, experts, found = self.tokens[order], self.experts, []
        for step in itertools.count(1):
            same = (tokens[step:] == tokens[:-step]).nonzero().flatten()
            if not len(same):
                break
            found.append(torch.stack([order[same], order[same + step]]))
        if not found:
            return
        rows = torch.cat(found, 1)
        cells = experts[rows[0]] * e + experts[rows[1]]
        counts = cells.bincount(minlength=e * e).tolist()
        parts = rows[:, cells.argsort(stable=True)].split(counts, 1)
        yield from ((cell // e, cell % e, part[0], part[1]) for cell, part in enumerate(parts) if counts[cell])

    @property
    def slices(self) -> list[slice]:
        """The rows of each expert."""
        found, start = [], 0
        for count in self.counts:
            found.append(slice(start, start + count))
            start += count
        return found


@dataclass(frozen=True)
class RoutedRows(Observation):
    """One forward pass; `term_outputs` are of rows (r,o)."""

    rows: Rows = field(kw_only=True)  # of experts that have weights
    row_weights: Tensor = field(kw_only=True)  # w (r)
    row_gates: Tensor | None = field(kw_only=True)  # that multiply what experts take (r); None: 1
    row_hidden: Callable[[Tensor, int], Tensor] = field(
        kw_only=True
    )  # what an expert's last linear takes (r,h) of rows

    @property
    def weighted(self) -> Tensor:
        """w·f of each row (r,o), in float32."""
        return self._weighted(self.term_outputs)

    def _weighted(self, outputs: Tensor) -> Tensor:
        return outputs.float() * self.row_weights.float()[:, None]

    def select(self, index: Tensor) -> RoutedRows:
        """Return the observation of some of the inputs."""
        b, m = self.tokens.shape[:2]
        place = torch.full((b,), -1, device=index.device).index_put((index,), torch.arange(len(index)).to(index))
        of_rows = place[self.rows.tokens // m]
        is_kept = of_rows >= 0
        rows = self.rows.where(is_kept)
        parts = {name: getattr(self, name)[index] for name in ("weights", "mass", "output", "tokens")}
        return replace(
            self, **parts, mask=None if self.mask is None else self.mask[index],
            term_outputs=self.term_outputs[is_kept], row_weights=self.row_weights[is_kept],
            row_gates=None if self.row_gates is None else self.row_gates[is_kept],
            rows=rows._replace(tokens=of_rows[is_kept] * m + rows.tokens % m),
        )  # fmt: skip

    def taken_by(self, expert: int) -> Tensor:
        """Return what an expert's last linear takes of its rows, times their weights (r,h)."""
        rows = self.rows.slices[expert]
        return self.row_hidden(self._inputs(rows), expert).float() * self.row_weights[rows, None].float()

    def _inputs(self, rows: slice) -> Tensor:
        """Return what experts take of some rows (r,d)."""
        inputs = self.tokens.flatten(0, 1)[self.rows.tokens[rows]]
        return inputs if self.row_gates is None else (inputs * self.row_gates[rows, None]).to(inputs.dtype)

    def hidden_products(self, others: Tensor, of_inputs: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """Add HᵀH to `power` and return products of H, see Observation: of each two experts on their common tokens."""
        m, e, slices = others.shape[1], len(self.rows.counts), self.rows.slices
        taken = [self.taken_by(expert) for expert in range(e)]
        blocks, others = power.unflatten(0, (e, -1)).unflatten(2, (e, -1)), others.flatten(0, 1)
        for one, other, rows, more in self.rows.common():
            block = taken[one][rows - slices[one].start].mT @ taken[other][more - slices[other].start]
            blocks[one, :, other] += block
            blocks[other, :, one] += block.mT
        with_tokens, with_inputs = [], []
        for expert, rows_of_expert in enumerate(slices):
            tokens, rows = self.rows.tokens[rows_of_expert], taken[expert]
            blocks[expert, :, expert] += rows.mT @ rows
            with_tokens.append(rows.mT @ others[tokens])
            with_inputs.append(rows.mT @ of_inputs[tokens // m])
        return torch.cat(with_tokens).to(power.dtype), torch.cat(with_inputs).to(power.dtype)

    def hidden_moments(self, experts: range, near: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return sums over the rows of some experts, see Observation."""
        found, points = [], []
        for place, j in enumerate(experts):
            rows = self.rows.slices[j]
            taken, weight = self.row_hidden(self._inputs(rows), j).float(), self.row_weights[rows].float().square()
            empty = taken.new_zeros(taken.shape[1])
            points.append(near[place] if near is not None else taken.mean(0) if len(taken) else empty)
            around = taken - points[-1]
            weighted = around * weight[:, None]
            found.append((weighted.mT @ around, weighted.sum(0), weight.sum()))
        power, sums, weights = (torch.stack(parts) for parts in zip(*found, strict=True))
        return torch.stack(points), (power, sums, weights)

    def term_sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums over rows of w (n,1), of w·f (n,1,o) and of w·|f|² (n,1)."""
        weighted = self.weighted
        squares = (weighted * self.term_outputs.float()).sum(1)
        sums = [
            torch.stack([part[rows].sum(0, dtype=dtype) for rows in self.rows.slices])
            for part in (self.row_weights.float(), weighted, squares)
        ]
        return sums[0][:, None], sums[1][:, None], sums[2][:, None]

    def run_sums(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return how many tokens run each expert (n), and the sums over these of |w·f| (n), f (n,o) and |f|² (n)."""
        outputs, slices = self.term_outputs.float(), self.rows.slices
        of_rows = self.weighted.norm(dim=1), outputs, outputs.square().sum(1)
        found = [torch.stack([part[rows].sum(0, dtype=dtype) for rows in slices]) for part in of_rows]
        return torch.tensor(self.rows.counts, dtype=dtype, device=outputs.device), *found

    def gram(self, dtype: torch.dtype, outputs: Tensor | None = None) -> Tensor:
        """Return the sum over tokens of <R_j, R_l> (n,n), with `outputs` (r,s) in place of f if given."""
        n, t = len(self.rows.counts), self.tokens.shape[:2].numel()
        added = self._weighted(self.term_outputs if outputs is None else outputs)
        order = self.rows.tokens.argsort(stable=True)
        tokens, experts = self.rows.tokens[order], self.rows.experts[order]
        each = tokens.bincount(minlength=t)
        first = each.cumsum(0) - each
        most = int(each.max()) if len(tokens) else 0
        place = torch.arange(len(tokens), device=tokens.device) - first[tokens]  # among the rows of its token
        total = added.new_zeros(n * n, dtype=dtype)
        step = max(1, min(t, WORKSPACE // max(1, most * (added.shape[1] + most))))
        bounds = torch.searchsorted(tokens, torch.arange(0, t + step, step, device=tokens.device)).tolist()
        for chunk, (start, stop) in enumerate(itertools.pairwise(bounds)):
            where = tokens[start:stop] - chunk * step, place[start:stop]
            filled = added.new_zeros(step, most, added.shape[1])
            filled[where] = added[order[start:stop]]
            owner = experts.new_zeros(step, most)
            owner[where] = experts[start:stop]
            cells = owner[:, :, None] * n + owner[:, None]
            total.index_add_(0, cells.flatten(), (filled @ filled.mT).flatten().to(dtype))
        return total.view(n, n)

    def renorm_gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over tokens of <E_j, E_l> - <R_j, R_l> (n,n), with E_j = R_j - c_j·Y.

        c are the weights of a token's experts divided by their sum. To add to the Gram matrix where what is left of Y
        is divided by the share of the kept experts, before that division.
        """
        weights, output = self.weights.float().flatten(0, 1)[:, :, 0], self.output.float().flatten(0, 1)
        share = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # (t,n)
        along = torch.zeros_like(share)  # <R_j, Y>
        along[self.rows.tokens, self.rows.experts] = (self.weighted * output[self.rows.tokens]).sum(1)
        with_output = share.mT @ along
        squares = (share * output.square().sum(1, keepdim=True)).mT @ share
        return (squares - with_output - with_output.mT).to(dtype)

    def lost(self, mean: Tensor, directions: Tensor) -> Tensor:
        """Return what each row's output differs from its expert's mean (n,1,o), in some directions (o,s): (r,s)."""
        projected = self.term_outputs.float() @ directions
        return projected - (mean[:, 0] @ directions)[self.rows.experts]

    def add_cross(self, z: Tensor, of_inputs: Tensor, outputs: Tensor, cross: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the sum over inputs of ZᵀR_j to `cross`, with `outputs` (r,s) in place of f, and return that of ZᵀC, see
        Observation.
        """
        q, m = z.shape[2], z.shape[1]
        added, z = self._weighted(outputs), z.flatten(0, 1)
        for j, rows in enumerate(self.rows.slices):
            tokens = self.rows.tokens[rows]
            cross[j, :q].addmm_(z[tokens].mT, added[rows])
            cross[j, q:].addmm_(of_inputs[tokens // m].mT, added[rows])
        return z.to(dtype).mT @ self.weights.flatten(2).flatten(0, 1).to(dtype)

    def products(self, gap: Tensor, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over rows of <w·f, gap> (n), for a gap (b,m,s) and `outputs` (r,s) in place of f."""
        along = (self._weighted(outputs) * gap.flatten(0, 1)[self.rows.tokens]).sum(1)
        return torch.stack([along[rows].sum(dtype=dtype) for rows in self.rows.slices])

    def moments(
        self, experts: Sequence[int], near_inputs: Tensor | None, near_outputs: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return sums over the rows of some experts, see Observation."""
        slices, found = self.rows.slices, []
        near = [] if near_inputs is None else [*near_inputs]
        for place, j in enumerate(experts):
            inputs, outputs = self._inputs(slices[j]).float(), self.term_outputs[slices[j]].float()
            if near_inputs is None:
                near.append(inputs.mean(0) if len(inputs) else inputs.new_zeros(inputs.shape[1]))
            weight = self.row_weights[slices[j]].float().square()
            around = inputs - near[place], outputs - near_outputs[place]
            found.append(weighted_moments(weight[None], around[0][None], around[1][None]))
        return torch.stack(near), tuple(torch.cat(parts) for parts in zip(*found, strict=True))
