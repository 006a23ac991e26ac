"""Values of one forward pass of a layer, and the sums over inputs that calibration needs.

Expert j adds R_j, the sum over its p terms of weight × output f, to the layer's output (m,o). A term has one
output for all tokens of an input, so that sums are taken without R_j; where each token has its own, tokens
count as inputs of one token.

Where windows of an input are folded into the batch, all rows but those of `mass` are of windows.

Axes: b inputs, m tokens, d width of the input, o width of the output, n experts, p terms per expert, e
experts that ran, S = n·p terms, q regressors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE = 2**24  # numbers at most in each of the temporary matrices


@dataclass(frozen=True)
class Observation:
    """One forward pass; padded tokens are zero in all of it. Sums are of a dense layer, over its inputs."""

    weights: Tensor  # of all experts' terms (b,m,n,p), in the order of the router's columns
    mass: Tensor  # mean weight of each expert over the tokens (b,n)
    output: Tensor  # Y (b,m,o)
    tokens: Tensor  # X (b,m,d)
    mask: Tensor | None  # tokens that are not padding (b,m); None: all
    chosen: Tensor | None  # experts that ran (b,e), n for none; None: the first columns', as many as have weights
    term_outputs: Tensor  # f, without surrogates (b,e,p,o); (b·m,e,p,o) where each token has its own
    slot_inputs: Tensor | None = None  # of the experts that have weights (b,e,p,d); None with `chosen`
    hidden: Callable[[Tensor], Tensor] | None = None  # from these to the inputs of the last linears (b,e,p,h)

    def select(self, index: Tensor) -> Observation:
        """Return the observation of some of the inputs."""
        b = len(self.mass)
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(
            self, **{name: part.unflatten(0, (b, -1))[index].flatten(0, 1) for name, part in tensors.items()}
        )

    def hidden_products(self, others: Tensor, of_inputs: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        """Add HᵀH to `power` (e·h,e·h); return the products Hᵀ of values of tokens (e·h,q) and of inputs (e·h,r).

        H (·,e·h) holds what the last linears of the experts that have weights take, times weights, summed over terms.

        others: values of tokens (b,m,q). of_inputs: those that are the same for all of an input's (b,r).
        """
        assert self.hidden is not None
        assert self.slot_inputs is not None
        taken = self.hidden(self.slot_inputs).float()
        e, p, h = taken.shape[1:]
        of_tokens = self._of_outputs(self.weights)[:, :, :e].float()
        with_tokens, with_inputs = (power.new_zeros(e * h, part.shape[-1]) for part in (others, of_inputs))
        step = max(1, WORKSPACE // (e * h * min(self.tokens.shape[1], self.weights.shape[2:].numel())))
        for some, weights, values, inputs in zip(
            *(part.split(step) for part in (taken, of_tokens, others, of_inputs)), strict=True
        ):
            flat = weights.flatten(2)
            # R of its QR decomposition has the same products, in fewer rows
            rows = torch.linalg.qr(flat, mode="r")[1] if e * p < flat.shape[1] else flat
            rows = torch.einsum("brjp,bjph->brjh", rows.unflatten(2, (e, p)), some).flatten(2).flatten(0, 1)
            power += rows.mT @ rows
            with_values = (flat.mT @ values).unflatten(1, (e, p))
            with_tokens += torch.einsum("bjph,bjpq->jhq", some, with_values).flatten(0, 1)
            with_inputs += torch.einsum("bjp,bjph->bjh", weights.sum(1), some).flatten(1).mT @ inputs
        return with_tokens, with_inputs

    def hidden_moments(self, experts: range, near: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return sums over tokens of what the last linears of some of the experts that have weights take.

        Of r·rᵀ (e,h,h), s·r (e,h) and s² (e), where r is the sum over terms of weight × hidden units, these as the
        difference from a point (e,h) near their mean, and s the sum of weights. near: None for the mean of these
        inputs. Returns near, too.
        """
        assert self.hidden is not None
        assert self.slot_inputs is not None
        some = slice(experts.start, experts.stop)
        taken = self.hidden(self.slot_inputs)[:, some].float()  # (b,e,p,h)
        weights = self._of_outputs(self.weights)[:, :, some].float()
        near = taken.mean((0, 2)) if near is None else near
        taken = taken - near[:, None]
        pairs = torch.einsum("bmep,bmeq->bepq", weights, weights)
        of_terms = pairs.sum(3)
        rows, weighted = (part.transpose(0, 1).flatten(1, 2) for part in (taken, pairs @ taken))  # (e,b·p,h)
        sums = torch.einsum("bep,beph->eh", of_terms, taken)
        return near, (rows.mT @ weighted, sums, of_terms.sum((0, 2)))

    def term_weights(self) -> Tensor:
        """Return the weights (b,m,n·p), zero for terms that ran for their own input."""
        weights = self.weights.float()
        if self.chosen is not None:
            weights = weights * is_dropped(self.chosen, weights)
        return weights.flatten(2)

    def term_sums(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums over inputs and tokens of the weights C (n,p), of C·f (n,p,o) and of C·|f|² (n,p)."""
        mass = self._of_outputs(self.weights).sum(1, dtype=torch.float32)  # (b,n,p)
        outputs = self.term_outputs.float()
        weighted = mass[..., None] * outputs  # (b,n,p,o)
        squares = (weighted * outputs).sum(-1)
        return mass.sum(0, dtype=dtype), weighted.sum(0, dtype=dtype), squares.sum(0, dtype=dtype)

    def run_sums(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return how many tokens run each expert (n), and sums over these and over terms: of the norm of C·f (n), of f
        (n,o) and of |f|² (n).
        """
        outputs = self.term_outputs.float()
        norms = self._of_outputs(self.weights).sum(1, dtype=torch.float32) * outputs.norm(dim=-1)
        tokens = self.mass.new_tensor(self.weights[:, :, 0, 0].numel()) if self.mask is None else self.mask.sum()
        found = [part.sum((0, 2), dtype=dtype) for part in (norms, outputs, outputs.square().sum(-1))]
        return tokens.to(dtype).expand_as(found[0]), *found

    def gram(self, dtype: torch.dtype, outputs: Tensor | None = None) -> Tensor:
        """Return the sum over inputs of <R_j, R_l> = Σ_pq (CᵀC)_jp,lq · <f_jp, f_lq> (n,n).

        outputs: in place of f, also of another width (…,e,p,s).
        """
        n, p = self.weights.shape[2:]
        terms = n * p
        outputs = self.term_outputs if outputs is None else outputs
        step = max(1, min(WORKSPACE // (2 * terms**2), len(outputs)))
        total = self.weights.new_zeros(terms, terms, dtype=dtype)
        of_weights, of_outputs = total.new_empty(2, step, terms, terms, dtype=torch.float32)
        parts = self._of_outputs(self.weights).flatten(2), outputs.flatten(1, 2)
        for c, f in zip(*(part.float().split(step) for part in parts), strict=True):
            of_terms = torch.bmm(c.mT, c, out=of_weights[: len(c)])
            of_terms *= torch.bmm(f, f.mT, out=of_outputs[: len(c)])
            total += of_terms[0] if len(c) == 1 else of_terms.sum(0, dtype=dtype)
        return total if p == 1 else total.view(n, p, n, p).sum((1, 3))

    def renorm_gram(self, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <C_j·(f_j - Y), C_l·(f_l - Y)> - <R_j, R_l> (n,n).

        To add to the Gram matrix where kept experts' weights are made to sum to 1, before that division.
        """
        weights, output = self._of_outputs(self.weights).float(), self._of_outputs(self.output).float()
        along = output @ self.term_outputs.float().flatten(1, 2).mT  # <f_jp, Y> (b,m,n·p)
        mass = weights.sum(3).flatten(0, 1)  # (b·m,n)
        added = (along.view_as(weights) * weights).sum(3).flatten(0, 1)
        with_output = mass.mT @ added
        squares = (mass * output.square().sum(2).flatten()[:, None]).mT @ mass
        return (squares - with_output - with_output.mT).to(dtype)

    def lost(self, mean: Tensor, directions: Tensor) -> Tensor:
        """Return what outputs differ from mean ones (n,p,o), in some directions (o,s): (…,n,p,s)."""
        return (self.term_outputs.float() - mean) @ directions

    def add_cross(self, z: Tensor, of_inputs: Tensor, outputs: Tensor, cross: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the sum over inputs of ZᵀR_j to `cross` (n,q + r,s), with `outputs` (…,n,p,s) in place of f; return that
        of ZᵀC (q,n·p), in a wide float.

        z: regressors of each token (b,m,q). of_inputs: those that are the same for all of an input's (b,r).
        """
        n, p = self.weights.shape[2:]
        q = z.shape[2]
        step = max(1, WORKSPACE // (q * n * p))
        weights = self._of_outputs(self.weights).float()
        total = weights.new_zeros(q, n * p, dtype=dtype)
        for some, c, f in zip(*(part.split(step) for part in (self._of_outputs(z), weights, outputs)), strict=True):
            products = some.mT @ c.flatten(2)  # (b,q,n·p)
            total += products.sum(0, dtype=dtype)
            of_expert = products.unflatten(2, (n, p)).permute(2, 1, 0, 3).reshape(n, -1, len(c) * p)
            cross[:, :q].baddbmm_(of_expert, f.transpose(0, 1).reshape(n, len(c) * p, -1))
        added = (weights.sum(1)[..., None] * outputs).sum(2)  # of all tokens (b,n,s); (b·m,n,s) where each has its own
        added = added.unflatten(0, (len(of_inputs), -1)).sum(1)
        cross[:, q:] += torch.einsum("br,bns->nrs", of_inputs, added)
        return total

    def products(self, gap: Tensor, outputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sum over inputs of <R_j, gap> (n), for a gap (b,m,s) and `outputs` (…,n,p,s) in place of f."""
        weights = self._of_outputs(self.weights).float().flatten(2)
        along = (weights.mT @ self._of_outputs(gap)) * outputs.flatten(1, 2)
        return along.sum((0, 2), dtype=dtype).view(self.weights.shape[2:]).sum(1)

    def moments(
        self, experts: Sequence[int], near_inputs: Tensor | None, near_outputs: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return `weighted_moments` of some experts' inputs and outputs, with the sums of squared weights over tokens.

        Both are taken as differences from points near their means, (e,d) and (e,o); near_inputs: None for the means
        of these inputs. Returns near_inputs, too.
        """
        assert self.slot_inputs is not None
        index = torch.tensor(experts, device=self.tokens.device)
        weight = self.weights[:, :, index].float().square().sum(1).permute(1, 0, 2).flatten(1)  # (e,b·p)
        inputs, outputs = (
            part[:, index].float().transpose(0, 1).flatten(1, 2) for part in (self.slot_inputs, self.term_outputs)
        )
        near_inputs = inputs.mean(1) if near_inputs is None else near_inputs
        return near_inputs, weighted_moments(weight, inputs - near_inputs[:, None], outputs - near_outputs[:, None])

    def _of_outputs(self, part: Tensor) -> Tensor:
        """Return values of the tokens (b,m,…) grouped as the outputs are."""
        return part.reshape(len(self.term_outputs), -1, *part.shape[2:])


def is_dropped(chosen: Tensor, weights: Tensor) -> Tensor:
    """Return 1 for experts that are not chosen (b,e), n for none, else 0: (b,1,n,1), for weights (b,m,n,p)."""
    dropped = torch.ones_like(weights[:, 0, :, 0])
    return F.pad(dropped, (0, 1)).scatter_(1, chosen, 0)[:, None, :-1, None]


def weighted_moments(weight: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, ...]:
    """Return sums over rows with weights (e,r), of inputs s (e,r,d) and outputs f (e,r,o).

    Of weights (e), s (e,d), f (e,o), s·sᵀ (e,d,d), s·fᵀ (e,d,o) and |f|² (e).
    """
    weighted = inputs * weight[:, :, None]
    of_outputs = (weight[:, None] @ outputs)[:, 0], weighted.mT @ inputs, weighted.mT @ outputs
    return weight.sum(1), weighted.sum(1), *of_outputs, (weight * outputs.square().sum(2)).sum(1)


def mean_token(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean (b,d) of the tokens x (b,m,d) that are not padding by the mask (b,m)."""
    if mask is None:
        return x.mean(1)
    return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def masked(part: Tensor, mask: Tensor | None) -> Tensor:
    """Return values of tokens (b,m,…) with zeros in place of padding by a mask (b,m)."""
    return part if mask is None else part * mask.view(*mask.shape, *[1] * (part.ndim - 2))
