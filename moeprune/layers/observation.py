"""Values of one forward pass of a layer, and the sums over inputs that calibration needs.

Expert j adds R_j = sum over its p terms of weight × output to the layer's output (m,o). `Observation` takes
every sum from R_j itself; a family whose terms share structure overrides what it can compute without R_j.

Axes: b inputs, m tokens, d width of the input, o width of the output, n experts, p terms per expert, e
experts that ran, q regressors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeprune.plan import AFFINE

WORKSPACE = 2**24
"""Numbers at most in each of the temporary matrices."""


@dataclass(frozen=True)
class Observation:
    """One forward pass. Padded tokens are zero in all of it.

    chosen: experts that ran for each input, n standing for none; None: the first of the router's columns, as
    many as have weights.
    """

    weights: Tensor  # of all experts' terms (b,m,n,p), in the order of the router's columns
    mass: Tensor  # mean weight of each expert over the tokens (b,n)
    output: Tensor  # Y (b,m,o)
    tokens: Tensor  # X (b,m,d)
    mask: Tensor | None  # tokens that are not padding (b,m); None: all
    chosen: Tensor | None  # (b,e)

    def select(self, index: Tensor) -> Observation:
        """Return the observation of some of the inputs."""
        parts = {name: part[index] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **parts)

    def contributions(self) -> Tensor:
        """Return R (b,e,m,o), what each expert that ran adds to the output. For a family to provide."""
        raise NotImplementedError

    def weighted_hidden(self) -> Tensor:
        """Return weights × inputs of the experts' last linears, summed over terms (b,m,e·h), for `refit`."""
        raise NotImplementedError

    def regressors(self, compensation: str) -> Tensor:
        """Return Z (b,m,q): the weights, zero for terms that ran for their own input; for `affine` also the
        tokens, their mean, and 1.
        """
        weights = self.weights.float()
        if self.chosen is not None:
            weights = weights * is_dropped(self.chosen, weights)[:, None, :, None]
        weights = weights.flatten(2)
        if compensation not in AFFINE:
            return weights
        tokens, mask = self.tokens.float(), self.mask
        one = torch.ones_like(tokens[:, :, :1]) if mask is None else mask[:, :, None].float()
        return torch.cat([weights, tokens, one * mean_token(tokens, mask)[:, None], one], dim=2)

    def term_sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each term, the sums over inputs and tokens of its weight (n,p), of weight × output
        (n,p,o) and of weight × |output|² (n,p).
        """
        weights = self.weights.float()
        outputs = self.contributions().float()  # (b,n,m,o); one term each
        squares = outputs.square().sum(3).transpose(1, 2) / weights[..., 0].clamp_min(1e-30)
        return (
            weights.sum((0, 1), dtype=dtype),
            outputs.sum((0, 2), dtype=dtype)[:, None],
            squares.sum((0, 1), dtype=dtype)[:, None],
        )

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j, R_l> (n,n)."""
        added = self.contributions().float().transpose(0, 1).flatten(1)
        return (added @ added.mT).to(dtype)

    def renorm_gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j - w_j·Y, R_l - w_l·Y> - <R_j, R_l> (n,n), w_j a weight.

        To add to the Gram matrix where kept experts' weights are made to sum to 1, before that division.
        """
        weights = self.weights.float().sum(3).transpose(1, 2)[..., None]  # (b,n,m,1)
        added = self.contributions().float()
        lost = (added - weights * self.output.float()[:, None]).transpose(0, 1).flatten(1)
        return (lost @ lost.mT).to(dtype) - self.gram(dtype)

    def add_cross(self, z: Tensor, cross: Tensor) -> None:
        """Add the sum over inputs of ZᵀR_j to `cross` (n,q,o), for Z (b,m,q)."""
        cross += torch.einsum("bmq,bnmo->nqo", z, self.contributions().float()).to(cross)

    def products(self, gap: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j, gap> (n), for a gap (b,m,o)."""
        return torch.einsum("bnmo,bmo->n", self.contributions().float(), gap).to(dtype)


@dataclass(frozen=True)
class SlotObservation(Observation):
    """One forward pass of a Soft MoE: an expert's output is one vector for each of its slots."""

    slot_outputs: Tensor  # f (b,e,p,o), without surrogates
    slot_inputs: Tensor | None  # of the experts that have weights (b,e,p,d); None with `chosen`
    hidden: Callable[[Tensor], Tensor]  # from these to what the experts' last linears take (b,e,p,h)

    def contributions(self) -> Tensor:
        """Return R (b,e,m,o)."""
        weights = self.weights[:, :, : self.slot_outputs.shape[1]]
        return torch.einsum("bmep,bepo->bemo", weights, self.slot_outputs.to(weights.dtype))

    def weighted_hidden(self) -> Tensor:
        """Return C_j·h_j (b,m,e·h)."""
        assert self.slot_inputs is not None
        hidden = self.hidden(self.slot_inputs).float()
        weights = self.weights[:, :, : hidden.shape[1]].float()
        return torch.einsum("bmep,beph->bmeh", weights, hidden).flatten(2)

    def term_sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums over inputs of C (n,p), C·f (n,p,o) and C·|f|² (n,p)."""
        slot_mass = self.weights.sum(1, dtype=torch.float32)  # (b,n,p)
        outputs = self.slot_outputs.float()
        weighted = slot_mass[..., None] * outputs  # (b,n,p,o)
        squares = (weighted * outputs).sum(-1)
        return slot_mass.sum(0, dtype=dtype), weighted.sum(0, dtype=dtype), squares.sum(0, dtype=dtype)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j, R_l> = Σ_pq (CᵀC)_jp,lq · <f_jp, f_lq> (n,n)."""
        n = self.weights.shape[2]
        gram = self.weights.new_zeros(n, n, dtype=dtype)
        for c, f, _ in self._chunks():
            gram += self._of_experts((c.mT @ c) * (f @ f.mT), dtype)
        return gram

    def renorm_gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <C_j·(f_j - Y), C_l·(f_l - Y)> - <R_j, R_l> (n,n)."""
        n = self.weights.shape[2]
        gram = self.weights.new_zeros(n, n, dtype=dtype)
        for c, f, y in self._chunks():
            with_output = c.mT @ (c * (y @ f.mT))  # C_lᵀ·(C_j∘<f_j, Y>) (b,S,S)
            squares = (c * y.square().sum(2, keepdim=True)).mT @ c
            gram += self._of_experts(squares - with_output - with_output.mT, dtype)
        return gram

    def add_cross(self, z: Tensor, cross: Tensor) -> None:
        """Add the sum over inputs of ZᵀC_j·f_j to `cross` (n,q,o)."""
        n, p = self.weights.shape[2:]
        step = max(1, WORKSPACE // (z.shape[2] * n * p))
        parts = (z, self.weights.float(), self.slot_outputs.float())
        for some, c, f in zip(*(part.split(step) for part in parts), strict=True):
            shared = (some.mT @ c.flatten(2)).unflatten(2, (n, p))  # ZᵀC (b,q,n,p)
            of_expert = shared.permute(2, 1, 0, 3).reshape(n, -1, len(c) * p)
            cross.baddbmm_(of_expert, f.transpose(0, 1).reshape(n, len(c) * p, -1))

    def products(self, gap: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j, gap> (n)."""
        along = (self.weights.float().flatten(2).mT @ gap) * self.slot_outputs.float().flatten(1, 2)
        return along.sum((0, 2), dtype=dtype).view(self.weights.shape[2:]).sum(1)

    def _chunks(self) -> list[tuple[Tensor, ...]]:
        """C (b,m,S), f (b,S,o) and Y (b,m,o) of some inputs at a time, with S = n·p slots."""
        step = max(1, WORKSPACE // (2 * (self.weights.shape[2] * self.weights.shape[3]) ** 2))
        parts = self.weights.flatten(2), self.slot_outputs.flatten(1, 2), self.output
        return list(zip(*(part.float().split(step) for part in parts), strict=True))

    def _of_experts(self, of_slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum products of slots (b,S,S) over inputs and each expert's slots (n,n)."""
        n, p = self.weights.shape[2:]
        return of_slots.sum(0, dtype=dtype).view(n, p, n, p).sum((1, 3))


def is_dropped(chosen: Tensor, weights: Tensor) -> Tensor:
    """Return 1 for experts that are not chosen (b,e), n for none, else 0: (b,n), for weights (b,m,n,p)."""
    dropped = torch.ones_like(weights[:, 0, :, 0])
    return F.pad(dropped, (0, 1)).scatter_(1, chosen, 0)[:, :-1]


def mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean (b,d) of the tokens x (b,m,d) that are not padding by the mask (b,m)."""
    if mask is None:
        return x.mean(1)
    return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
